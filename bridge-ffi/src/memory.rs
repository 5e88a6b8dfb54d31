//! Memory of callers as slices: the only place that turns addresses into memory.
#![expect(
    unsafe_code,
    reason = "addresses and lengths come from C and C++, which vouch for them"
)]

use crate::checks::Rows;

/// The pieces of memory that rows are written to.
///
/// # Safety
/// The caller owns every piece of `rows` for writing for `'a`, nobody else reads or writes them meanwhile, and `rows`
/// went through [`crate::checks::check`] and, with all that is alive beside it, [`crate::checks::check_apart`].
/// `data` points to `rows.address`.
#[must_use]
pub unsafe fn pieces_mut<'a>(data: *mut u8, rows: &Rows) -> Vec<&'a mut [u8]> {
    let (len, stride) = (rows.piece_bytes, rows.stride_bytes);
    (0..rows.pieces)
        .map(|piece| {
            // SAFETY: pieces lie within the memory that `check` measured, which is not null and no longer than
            // `isize::MAX`, do not touch each other, and are the caller's alone.
            unsafe { std::slice::from_raw_parts_mut(data.add(piece * stride), len) }
        })
        .collect()
}

/// The pieces of memory that rows are read from.
///
/// # Safety
/// Every piece of `rows` is readable and not written for `'a`; `rows` went through [`crate::checks::check`].
/// `data` points to `rows.address`.
#[must_use]
pub unsafe fn pieces<'a>(data: *const u8, rows: &Rows) -> Vec<&'a [u8]> {
    let (len, stride) = (rows.piece_bytes, rows.stride_bytes);
    (0..rows.pieces)
        .map(|piece| {
            // SAFETY: as above, for reading.
            unsafe { std::slice::from_raw_parts(data.add(piece * stride), len) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_rows_and_nothing_between_them() {
        let mut memory = vec![0u8; 20];
        let rows = Rows {
            first_element: 0,
            address: memory.as_ptr().addr(),
            piece_bytes: 3,
            stride_bytes: 8,
            pieces: 3,
        };
        // SAFETY: 8 + 8 + 3 bytes are ours.
        for (number, piece) in unsafe { pieces_mut(memory.as_mut_ptr(), &rows) }
            .into_iter()
            .enumerate()
        {
            piece.fill(u8::try_from(number).unwrap() + 1);
        }
        // SAFETY: as above.
        let read = unsafe { pieces(memory.as_ptr(), &rows) };
        assert_eq!(read, [[1, 1, 1], [2, 2, 2], [3, 3, 3]]);
        let zeros = memory.iter().filter(|byte| **byte == 0).count();
        assert_eq!(zeros, 20 - 9);
    }
}
