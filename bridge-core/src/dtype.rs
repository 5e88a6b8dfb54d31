//! Element types, under the names that safetensors headers use.

use std::fmt;
use std::str::FromStr;

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(
    missing_docs,
    reason = "each variant is the safetensors word of its name"
)]
#[non_exhaustive]
pub enum Dtype {
    Bool,
    U8,
    I8,
    F8E4M3,
    F8E5M2,
    I16,
    U16,
    F16,
    Bf16,
    I32,
    U32,
    F32,
    I64,
    U64,
    F64,
}

/// One line a type: the variant, the safetensors word, torch's word, bytes an element.
const TABLE: [(Dtype, &str, &str, usize); 15] = [
    (Dtype::Bool, "BOOL", "bool", 1),
    (Dtype::U8, "U8", "uint8", 1),
    (Dtype::I8, "I8", "int8", 1),
    (Dtype::F8E4M3, "F8_E4M3", "float8_e4m3fn", 1),
    (Dtype::F8E5M2, "F8_E5M2", "float8_e5m2", 1),
    (Dtype::I16, "I16", "int16", 2),
    (Dtype::U16, "U16", "uint16", 2),
    (Dtype::F16, "F16", "float16", 2),
    (Dtype::Bf16, "BF16", "bfloat16", 2),
    (Dtype::I32, "I32", "int32", 4),
    (Dtype::U32, "U32", "uint32", 4),
    (Dtype::F32, "F32", "float32", 4),
    (Dtype::I64, "I64", "int64", 8),
    (Dtype::U64, "U64", "uint64", 8),
    (Dtype::F64, "F64", "float64", 8),
];

/// A word that names no known element type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{word}` is no dtype; known are {}", known())]
pub struct UnknownDtype {
    /// The word as it was given.
    pub word: String,
}

fn known() -> String {
    TABLE.map(|row| row.2).join(", ")
}

impl Dtype {
    fn row(self) -> &'static (Dtype, &'static str, &'static str, usize) {
        TABLE
            .iter()
            .find(|row| row.0 == self)
            .expect("every variant has its line in the table")
    }

    /// Bytes an element.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        self.row().3
    }

    /// The word that safetensors headers use (`BF16`).
    #[must_use]
    pub fn safetensors_word(self) -> &'static str {
        self.row().1
    }

    /// The word that torch and `config.json` use (`bfloat16`).
    #[must_use]
    pub fn torch_word(self) -> &'static str {
        self.row().2
    }

    /// Whether weights may be stored in this type: F16, BF16, F32 and F64.
    #[must_use]
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64)
    }

    /// The smallest floating-point type that holds every value of both.
    #[must_use]
    pub fn widest(self, other: Dtype) -> Dtype {
        match (self, other) {
            (a, b) if a == b => a,
            (Dtype::F64, _) | (_, Dtype::F64) => Dtype::F64,
            _ => Dtype::F32,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.safetensors_word())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    /// Reads safetensors' word or torch's (`BF16`, `bfloat16`, `torch.bfloat16`).
    fn from_str(word: &str) -> Result<Self, UnknownDtype> {
        let bare = word.strip_prefix("torch.").unwrap_or(word);
        TABLE
            .iter()
            .find(|row| row.1 == bare || row.2 == bare)
            .map(|row| row.0)
            .ok_or_else(|| UnknownDtype {
                word: word.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_both_worlds_name_the_same_type() {
        for (dtype, safetensors, torch, _) in TABLE {
            assert_eq!(safetensors.parse(), Ok(dtype));
            assert_eq!(torch.parse(), Ok(dtype));
            assert_eq!(format!("torch.{torch}").parse(), Ok(dtype));
        }
        assert!("bf17".parse::<Dtype>().is_err());
    }

    #[test]
    fn half_types_widen_to_float32_and_not_to_each_other() {
        assert_eq!(Dtype::F16.widest(Dtype::Bf16), Dtype::F32);
        assert_eq!(Dtype::Bf16.widest(Dtype::Bf16), Dtype::Bf16);
        assert_eq!(Dtype::Bf16.widest(Dtype::F64), Dtype::F64);
    }
}
