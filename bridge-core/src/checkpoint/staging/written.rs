//! Which bytes of a part have arrived, and their checksum.

use std::collections::BTreeMap;

/// Finished pieces of a part: start to end and CRC-32. Neighbours are joined.
#[derive(Debug, Default)]
pub(in crate::checkpoint) struct Written(BTreeMap<u64, (u64, u32)>);

impl Written {
    /// A part that is there from the start to `end`.
    pub(in crate::checkpoint) fn whole(end: u64, crc: u32) -> Self {
        Self((end > 0).then_some((0, (end, crc))).into_iter().collect())
    }

    /// `false` if a byte of the piece is there already.
    pub(in crate::checkpoint) fn insert(
        &mut self,
        mut start: u64,
        mut end: u64,
        mut crc: u32,
    ) -> bool {
        if let Some((before, (before_end, before_crc))) = self.0.range(..=start).next_back() {
            if *before_end > start {
                return false;
            }
            if *before_end == start {
                let before = *before;
                crc = joined(*before_crc, crc, end - start);
                self.0.remove(&before);
                start = before;
            }
        }
        if let Some((next, (next_end, next_crc))) = self.0.range(start..).next() {
            if *next < end {
                return false;
            }
            if *next == end {
                let next = *next;
                crc = joined(crc, *next_crc, next_end - next);
                end = *next_end;
                self.0.remove(&next);
            }
        }
        self.0.insert(start, (end, crc));
        true
    }

    /// How many bytes have arrived.
    pub(in crate::checkpoint) fn count(&self) -> u64 {
        self.0.iter().map(|(start, (end, _))| end - start).sum()
    }

    /// The checksum of a part that is there from its start.
    pub(in crate::checkpoint) fn crc(&self) -> u32 {
        self.0.get(&0).map_or(0, |(_, crc)| *crc)
    }
}

/// The CRC-32 of two pieces in a row, from those of each.
fn joined(first: u32, second: u32, second_len: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(first);
    hasher.combine(&crc32fast::Hasher::new_with_initial_len(second, second_len));
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_join_to_the_checksum_of_the_whole() {
        let bytes: Vec<u8> = (0..100u8).collect();
        let mut written = Written::default();
        for (start, end) in [(40usize, 60usize), (0, 10), (60, 100), (10, 40)] {
            let crc = crc32fast::hash(&bytes[start..end]);
            assert!(written.insert(start as u64, end as u64, crc));
        }
        assert_eq!(written.count(), 100);
        assert_eq!(written.crc(), crc32fast::hash(&bytes));
    }

    #[test]
    fn a_byte_that_arrives_twice_is_noticed() {
        let mut written = Written::default();
        assert!(written.insert(10, 20, 0));
        for (start, end) in [(15, 16), (0, 11), (19, 30), (10, 20), (0, 30)] {
            assert!(!written.insert(start, end, 0), "{start}..{end}");
        }
    }
}
