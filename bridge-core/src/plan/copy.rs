//! One strided copy.

use std::ops::Range;

/// Moves `rows` runs of `row_elements` elements. All numbers are elements, each side in its own dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Copy {
    /// Index into the tensor's sources.
    pub source: usize,
    /// First element in the source.
    pub source_start: usize,
    /// From one run to the next in the source.
    pub source_stride: usize,
    /// First element in the target.
    pub target_start: usize,
    /// From one run to the next in the target.
    pub target_stride: usize,
    /// Elements of one run.
    pub row_elements: usize,
    /// How many runs.
    pub rows: usize,
}

impl Copy {
    /// One contiguous run.
    #[must_use]
    pub fn run(source: usize, source_start: usize, target_start: usize, elements: usize) -> Self {
        Self {
            source,
            source_start,
            source_stride: elements,
            target_start,
            target_stride: elements,
            row_elements: elements,
            rows: 1,
        }
    }

    /// The same copy from the target to source number `source`.
    #[must_use]
    pub fn inverted(self, source: usize) -> Self {
        Self {
            source,
            source_start: self.target_start,
            source_stride: self.target_stride,
            target_start: self.source_start,
            target_stride: self.source_stride,
            ..self
        }
    }

    /// What it writes into `elements` of the target, counted from their start.
    pub(super) fn within(&self, elements: &Range<usize>) -> Vec<Self> {
        let rows = self.rows_within(elements);
        let last = self.target_start + self.rows.saturating_sub(1) * self.target_stride;
        if rows == (0..self.rows)
            && self.target_start >= elements.start
            && last + self.row_elements <= elements.end
        {
            let target_start = self.target_start - elements.start;
            return vec![Self {
                target_start,
                ..*self
            }];
        }
        rows.map(|row| {
            let start = self.target_start + row * self.target_stride;
            let from = elements.start.max(start);
            let to = elements.end.min(start + self.row_elements);
            let source_start = self.source_start + row * self.source_stride + from - start;
            Self::run(self.source, source_start, from - elements.start, to - from)
        })
        .collect()
    }

    /// The runs in the source, joined when they touch.
    pub fn source_runs(&self) -> impl Iterator<Item = Range<usize>> {
        runs(
            self.source_start,
            self.source_stride,
            self.row_elements,
            self.rows,
        )
    }

    /// The runs in the target, joined when they touch.
    pub fn target_runs(&self) -> impl Iterator<Item = Range<usize>> {
        runs(
            self.target_start,
            self.target_stride,
            self.row_elements,
            self.rows,
        )
    }

    /// The numbers of the runs that touch `elements` of the target.
    #[must_use]
    pub fn rows_within(&self, elements: &Range<usize>) -> Range<usize> {
        if self.rows == 0 || self.row_elements == 0 || elements.start >= elements.end {
            return 0..0;
        }
        let first = (elements.start + 1)
            .saturating_sub(self.target_start + self.row_elements)
            .div_ceil(self.target_stride.max(1));
        let end = elements
            .end
            .saturating_sub(self.target_start)
            .div_ceil(self.target_stride.max(1));
        first.min(self.rows)..end.min(self.rows)
    }
}

fn runs(
    start: usize,
    stride: usize,
    elements: usize,
    rows: usize,
) -> impl Iterator<Item = Range<usize>> {
    let touching = rows <= 1 || stride == elements;
    let (rows, elements) = if touching {
        (rows.min(1), elements * rows)
    } else {
        (rows, elements)
    };
    (0..rows).map(move |row| {
        let from = start + row * stride;
        from..from + elements
    })
}

/// Joins copies whose neighbours touch on both sides, and runs of equal copies at equal distances.
pub(super) fn merge(copies: Vec<Copy>) -> Vec<Copy> {
    let mut touching: Vec<Copy> = Vec::with_capacity(copies.len());
    for copy in copies {
        match touching.last_mut() {
            Some(last)
                if last.rows == 1
                    && copy.rows == 1
                    && last.source == copy.source
                    && last.source_start + last.row_elements == copy.source_start
                    && last.target_start + last.row_elements == copy.target_start =>
            {
                let elements = last.row_elements + copy.row_elements;
                *last = Copy::run(last.source, last.source_start, last.target_start, elements);
            }
            _ => touching.push(copy),
        }
    }
    let mut merged: Vec<Copy> = Vec::with_capacity(touching.len());
    for copy in touching {
        if let Some(last) = merged.last_mut()
            && let Some(joined) = follow(*last, copy)
        {
            *last = joined;
        } else {
            merged.push(copy);
        }
    }
    merged
}

/// `last` with `next` as one more run, when it stands at the same distance as the runs before.
fn follow(last: Copy, next: Copy) -> Option<Copy> {
    if last.source != next.source || last.row_elements != next.row_elements || next.rows != 1 {
        return None;
    }
    let source_stride = next
        .source_start
        .checked_sub(last.source_start + (last.rows - 1) * last.source_stride)?;
    let target_stride = next
        .target_start
        .checked_sub(last.target_start + (last.rows - 1) * last.target_stride)?;
    let fits = last.rows == 1
        || (source_stride == last.source_stride && target_stride == last.target_stride);
    // Runs that overlap would break the arithmetic of `rows_within`.
    let apart = source_stride >= last.row_elements && target_stride >= last.row_elements;
    (fits && apart).then_some(Copy {
        source_stride,
        target_stride,
        rows: last.rows + 1,
        ..last
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_runs_become_one_and_equal_distances_a_stride() {
        let copies = vec![
            Copy::run(0, 0, 0, 4),
            Copy::run(0, 4, 4, 4),
            Copy::run(0, 16, 8, 8),
            Copy::run(0, 32, 16, 8),
            Copy::run(1, 0, 24, 8),
        ];
        let merged = merge(copies);
        assert_eq!(merged.len(), 2);
        assert_eq!(merged[0].rows, 3);
        assert_eq!(merged[0].source_stride, 16);
        assert_eq!(merged[0].target_stride, 8);
    }

    #[test]
    fn rows_within_finds_the_runs_that_touch_a_range() {
        let copy = Copy {
            source: 0,
            source_start: 0,
            source_stride: 5,
            target_start: 10,
            target_stride: 6,
            row_elements: 4,
            rows: 3,
        };
        for (range, wanted) in [
            (0..10, 0..0),
            (0..11, 0..1),
            (13..14, 0..1),
            (14..16, 1..1),
            (14..17, 1..2),
            (13..23, 0..3),
            (26..40, 3..3),
        ] {
            let found = copy.rows_within(&range);
            assert_eq!(found.len(), wanted.len(), "{range:?}: {found:?}");
            if !wanted.is_empty() {
                assert_eq!(found, wanted, "{range:?}");
            }
        }
    }
}
