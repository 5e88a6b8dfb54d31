//! Dtypes as numbers of the headers.

use bridge_core::Dtype;

use crate::error::FfiError;

/// Number `n` stands at place `n - 1`.
const NUMBERS: [Dtype; 15] = [
    Dtype::Bool,
    Dtype::U8,
    Dtype::I8,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
    Dtype::I16,
    Dtype::U16,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::I32,
    Dtype::U32,
    Dtype::F32,
    Dtype::I64,
    Dtype::U64,
    Dtype::F64,
];

/// The dtype of a number.
pub(crate) fn dtype_of(number: i32) -> Result<Dtype, FfiError> {
    usize::try_from(number)
        .ok()
        .and_then(|number| NUMBERS.get(number.checked_sub(1)?))
        .copied()
        .ok_or(FfiError::Number {
            what: "dtype",
            found: number,
            known: "bridge_dtype",
        })
}

/// The number of a dtype; 0 for one that the headers do not know.
pub(crate) fn number_of(dtype: Dtype) -> i32 {
    let place = NUMBERS.iter().position(|one| *one == dtype);
    place.map_or(0, |place| i32::try_from(place + 1).unwrap_or(0))
}
