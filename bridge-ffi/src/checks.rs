//! Memory of callers, checked by its numbers alone: no pointer is followed here.

use bridge_core::Dtype;

use crate::error::FfiError;

/// Memory as a caller describes it.
#[derive(Debug, Clone, Copy)]
pub struct Memory<'a> {
    /// The tensor that it belongs to.
    pub name: &'a str,
    /// Its first byte; 0 is null.
    pub address: usize,
    /// Bytes that are the caller's from there on.
    pub bytes: usize,
    /// Type of its elements.
    pub dtype: Dtype,
    /// From the beginning of a row to that of the next; 0: the rows touch.
    pub row_stride_bytes: usize,
    /// The first row that is wanted.
    pub first_row: usize,
    /// How many rows; `None`: all from the first on.
    pub num_rows: Option<usize>,
}

/// Where the rows of a tensor stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// The first element of the tensor.
    pub first_element: usize,
    /// The first byte in memory.
    pub address: usize,
    /// Bytes of a piece that stands together.
    pub piece_bytes: usize,
    /// From one piece to the next.
    pub stride_bytes: usize,
    /// How many pieces.
    pub pieces: usize,
}

impl Rows {
    /// The first byte of each piece.
    pub fn starts(&self) -> impl ExactSizeIterator<Item = usize> + use<> {
        let Self {
            address,
            stride_bytes,
            ..
        } = *self;
        // `check` saw that the last one does not overflow.
        (0..self.pieces).map(move |piece| address + piece * stride_bytes)
    }

    /// Bytes of all pieces.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.pieces * self.piece_bytes
    }
}

/// Checks the memory for rows of a tensor of `shape`.
///
/// # Errors
/// [`FfiError`] of the kinds argument, size, dtype and alignment.
pub fn check(memory: &Memory<'_>, shape: &[usize]) -> Result<Rows, FfiError> {
    let name = || memory.name.to_owned();
    if !memory.dtype.is_float() {
        return Err(FfiError::Dtype {
            name: name(),
            dtype: memory.dtype,
        });
    }
    let size = memory.dtype.size_bytes();
    let all_rows = shape.first().copied().unwrap_or(1);
    let row_elements: usize = shape.iter().skip(1).product();
    let rows = wanted_rows(memory, shape, all_rows)?;
    let too_large = || FfiError::Address {
        name: name(),
        address: memory.address,
        bytes: memory.bytes,
    };
    let row_bytes = row_elements.checked_mul(size).ok_or_else(too_large)?;
    let touching = memory.row_stride_bytes == 0 || memory.row_stride_bytes == row_bytes;
    let num_bytes = rows.checked_mul(row_bytes).ok_or_else(too_large)?;
    let wrong_size = |expected| FfiError::Bytes {
        name: name(),
        found: memory.bytes,
        expected,
        rows,
        row_bytes,
        stride: if touching { 0 } else { memory.row_stride_bytes },
        shape: shape.to_vec(),
        dtype: memory.dtype,
    };
    if !touching && memory.row_stride_bytes < row_bytes {
        return Err(FfiError::Stride {
            name: name(),
            stride: memory.row_stride_bytes,
            row_bytes,
        });
    }
    let needed = match (touching, rows.checked_sub(1)) {
        (true, _) => num_bytes,
        (false, None) => 0,
        (false, Some(before_last)) => before_last
            .checked_mul(memory.row_stride_bytes)
            .and_then(|start| start.checked_add(row_bytes))
            .ok_or_else(too_large)?,
    };
    if memory.bytes < needed || (touching && memory.bytes != needed) {
        return Err(wrong_size(needed));
    }
    if memory.address == 0 && needed > 0 {
        return Err(FfiError::NullData { name: name() });
    }
    memory
        .address
        .checked_add(memory.bytes)
        .filter(|_| isize::try_from(memory.bytes).is_ok())
        .ok_or_else(too_large)?;
    for (what, value, found) in [
        (
            "the address of the memory",
            memory.address,
            format!("{:#x}", memory.address),
        ),
        (
            "row_stride_bytes",
            memory.row_stride_bytes,
            memory.row_stride_bytes.to_string(),
        ),
    ] {
        if !value.is_multiple_of(size) {
            return Err(FfiError::Alignment {
                what,
                name: name(),
                found,
                size,
                dtype: memory.dtype,
            });
        }
    }
    let first_element = memory.first_row * row_elements;
    Ok(match touching {
        true => Rows {
            first_element,
            address: memory.address,
            piece_bytes: num_bytes,
            stride_bytes: num_bytes,
            pieces: usize::from(num_bytes > 0),
        },
        false => Rows {
            first_element,
            address: memory.address,
            piece_bytes: row_bytes,
            stride_bytes: memory.row_stride_bytes,
            pieces: if row_bytes > 0 { rows } else { 0 },
        },
    })
}

fn wanted_rows(memory: &Memory<'_>, shape: &[usize], all_rows: usize) -> Result<usize, FfiError> {
    let left = all_rows.checked_sub(memory.first_row);
    let wanted = memory.num_rows.or(left);
    match (left, wanted) {
        (Some(left), Some(wanted)) if wanted <= left => Ok(wanted),
        (_, wanted) => Err(FfiError::Rows {
            name: memory.name.to_owned(),
            first: memory.first_row,
            end: memory.first_row.saturating_add(wanted.unwrap_or(0)),
            rows: all_rows,
            shape: shape.to_vec(),
        }),
    }
}

/// Refuses memory that two tensors, or two ranges of one, would stand in.
///
/// Rows may take turns with other tensors' rows, as the halves of a fused matrix do.
///
/// # Errors
/// [`FfiError::Overlap`] names the first two.
pub fn check_apart<'a>(
    destinations: impl Iterator<Item = (&'a str, Rows)>,
) -> Result<(), FfiError> {
    let (mut names, mut pieces) = (Vec::new(), Vec::new());
    for (number, (name, rows)) in destinations.enumerate() {
        names.push(name);
        let ends = rows
            .starts()
            .map(|start| (start, start + rows.piece_bytes, number));
        pieces.extend(ends);
    }
    pieces.sort_unstable();
    let neighbours = pieces.iter().zip(pieces.iter().skip(1));
    for ((_, end, first), (start, _, second)) in neighbours {
        if start < end {
            return Err(FfiError::Overlap {
                first: names[*first].to_owned(),
                first_number: *first,
                second: names[*second].to_owned(),
                second_number: *second,
                address: *start,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    const MEMORY: Memory<'static> = Memory {
        name: "x",
        address: 0x1000,
        bytes: 0,
        dtype: Dtype::F32,
        row_stride_bytes: 0,
        first_row: 0,
        num_rows: None,
    };

    #[test]
    fn touching_rows_are_one_piece_and_strided_ones_many() {
        let whole = Memory {
            bytes: 48,
            ..MEMORY
        };
        let rows = check(&whole, &[4, 3]).unwrap();
        assert_eq!(
            (rows.pieces, rows.piece_bytes, rows.first_element),
            (1, 48, 0)
        );
        let part = Memory {
            bytes: 28,
            row_stride_bytes: 16,
            first_row: 1,
            num_rows: Some(2),
            ..MEMORY
        };
        let rows = check(&part, &[4, 3]).unwrap();
        assert_eq!(rows.starts().collect::<Vec<_>>(), [0x1000, 0x1010]);
        assert_eq!((rows.piece_bytes, rows.first_element), (12, 3));
        let scalar = Memory { bytes: 4, ..MEMORY };
        assert_eq!(check(&scalar, &[]).unwrap().num_bytes(), 4);
        let none = Memory {
            address: 0,
            num_rows: Some(0),
            ..MEMORY
        };
        assert_eq!(check(&none, &[4, 3]).unwrap().pieces, 0);
        let empty = Memory {
            address: 0,
            ..MEMORY
        };
        assert_eq!(check(&empty, &[0, 3]).unwrap().num_bytes(), 0);
    }

    #[test]
    fn memory_that_does_not_fit_is_refused_with_its_numbers() {
        let whole = Memory {
            bytes: 48,
            ..MEMORY
        };
        for (memory, status, wanted) in [
            (
                Memory { bytes: 47, ..whole },
                Status::Size,
                "has 47 bytes, 4 rows of 12 bytes need 48",
            ),
            (Memory { bytes: 49, ..whole }, Status::Size, "has 49 bytes"),
            (
                Memory {
                    address: 0,
                    ..whole
                },
                Status::Argument,
                "the memory for `x` is null",
            ),
            (
                Memory {
                    address: 0x1002,
                    ..whole
                },
                Status::Alignment,
                "0x1002",
            ),
            (
                Memory {
                    bytes: 66,
                    row_stride_bytes: 18,
                    ..MEMORY
                },
                Status::Alignment,
                "row_stride_bytes of `x` is 18",
            ),
            (
                Memory {
                    bytes: 59,
                    row_stride_bytes: 16,
                    ..MEMORY
                },
                Status::Size,
                "need 60 (shape [4, 3], F32, 16 bytes apart)",
            ),
            (
                Memory {
                    row_stride_bytes: 8,
                    ..whole
                },
                Status::Size,
                "row_stride_bytes of `x` is 8, but a row has 12 bytes",
            ),
            (
                Memory {
                    first_row: 3,
                    num_rows: Some(2),
                    ..whole
                },
                Status::Size,
                "rows 3..5 of `x` were asked for, it has 4",
            ),
            (
                Memory {
                    first_row: 5,
                    ..whole
                },
                Status::Size,
                "rows 5..5",
            ),
            (
                Memory {
                    first_row: usize::MAX,
                    num_rows: Some(usize::MAX),
                    ..whole
                },
                Status::Size,
                "it has 4",
            ),
            (
                Memory {
                    dtype: Dtype::I32,
                    ..whole
                },
                Status::Dtype,
                "of dtype I32",
            ),
            (
                Memory {
                    address: usize::MAX - 43,
                    bytes: 48,
                    ..MEMORY
                },
                Status::Argument,
                "does not fit into the address space",
            ),
            (
                Memory {
                    row_stride_bytes: usize::MAX,
                    bytes: 48,
                    ..MEMORY
                },
                Status::Argument,
                "does not fit into the address space",
            ),
        ] {
            let error = check(&memory, &[4, 3]).unwrap_err();
            assert!(error.text().contains(wanted), "{}", error.text());
            assert_eq!(error.status(), status, "{}", error.text());
        }
    }

    fn rows(address: usize, piece_bytes: usize, stride_bytes: usize, pieces: usize) -> Rows {
        Rows {
            first_element: 0,
            address,
            piece_bytes,
            stride_bytes,
            pieces,
        }
    }

    #[test]
    fn memory_is_shared_by_nobody_but_rows_may_take_turns() {
        let one = rows(100, 8, 16, 4);
        for (other, apart) in [
            (rows(108, 8, 16, 4), true),
            (rows(152, 4, 4, 1), false),
            (rows(156, 4, 4, 1), true),
            (rows(164, 100, 100, 1), true),
            (rows(99, 1, 1, 1), true),
            (rows(99, 2, 2, 1), false),
            (rows(0, 1000, 1000, 1), false),
            (rows(112, 8, 16, 2), false),
        ] {
            for pair in [[("a", one), ("b", other)], [("b", other), ("a", one)]] {
                let found = check_apart(pair.into_iter());
                assert_eq!(found.is_ok(), apart, "{other:?}");
            }
        }
    }
}
