//! From a range of a tensor's bytes to the bytes of one stored box.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::item::Stored;

/// Bytes of the buffer between a file and rows that are scattered in their tensor.
const BUFFER: u64 = 256 << 10;

/// A box in its tensor, in bytes.
#[derive(Debug)]
pub(super) struct BoxCopy<'a> {
    /// Of the tensor.
    pub(super) shape: &'a [usize],
    pub(super) offsets: &'a [u64],
    pub(super) sizes: &'a [u64],
    /// The box as it is stored; as many axes as the tensor.
    pub(super) stored: &'a Stored,
    /// The first byte of the item in `file`.
    pub(super) item_start: u64,
    pub(super) file: &'a File,
}

impl BoxCopy<'_> {
    /// Fills in what `into`, the tensor's bytes from `start` on, has in common with the box, and reads no more than
    /// that where the box is stored in row-major order.
    pub(super) fn copy(&self, start: u64, into: &mut [u8]) -> io::Result<()> {
        let wanted = start..start + into.len() as u64;
        if self.stored.is_contiguous() {
            self.copy_runs(&wanted, into)
        } else {
            self.copy_elements(&wanted, into)
        }
    }

    fn element_bytes(&self) -> u64 {
        self.stored.dtype.size_bytes() as u64
    }

    /// The tensor's row-major strides in bytes.
    fn strides(&self) -> Vec<u64> {
        let mut stride = self.element_bytes();
        let mut strides: Vec<u64> = self
            .shape
            .iter()
            .rev()
            .map(|size| {
                let here = stride;
                stride *= *size as u64;
                here
            })
            .collect();
        strides.reverse();
        strides
    }

    /// Runs are the pieces of the box that stand together in the tensor. They follow each other in the file.
    fn copy_runs(&self, wanted: &Range<u64>, into: &mut [u8]) -> io::Result<()> {
        let strides = self.strides();
        // The last axis that is cut; all behind it are whole.
        let cut = (0..self.shape.len())
            .rev()
            .find(|axis| self.sizes[*axis] != self.shape[*axis] as u64)
            .unwrap_or(0);
        let (run_bytes, base, outer) = match strides.get(cut) {
            Some(stride) => (
                self.sizes[cut] * stride,
                self.offsets[cut] * stride,
                &self.sizes[..cut],
            ),
            None => (self.element_bytes(), 0, &self.sizes[..0]),
        };
        let runs: u64 = outer.iter().product();
        let begin = |run: u64| {
            let mut rest = run;
            let axes = outer.iter().zip(self.offsets.iter().zip(&strides)).rev();
            axes.fold(base, |at, (size, (offset, stride))| {
                let index = rest % size;
                rest /= size;
                at + (offset + index) * stride
            })
        };
        let mut run = first_where(runs, |run| begin(run) + run_bytes > wanted.start);
        let mut buffer = Vec::new();
        while run < runs && begin(run) < wanted.end {
            let at = begin(run);
            let piece = at.max(wanted.start)..(at + run_bytes).min(wanted.end);
            let stored_at = self.item_start + self.stored.first + run * run_bytes;
            if piece.end - piece.start >= BUFFER / 2 {
                let target = slice(into, piece.start - wanted.start, piece.end - piece.start);
                self.file
                    .read_exact_at(target, stored_at + (piece.start - at))?;
                run += 1;
                continue;
            }
            let most = (BUFFER / run_bytes).max(1);
            let last = (run + most).min(runs);
            let stop = run + first_where(last - run, |more| begin(run + more) >= wanted.end);
            let from = run * run_bytes + (piece.start - at);
            let final_begin = begin(stop - 1);
            let to = (stop - 1) * run_bytes + (wanted.end - final_begin).min(run_bytes);
            buffer.resize(length(to - from), 0);
            let source = self.item_start + self.stored.first + from;
            self.file.read_exact_at(&mut buffer, source)?;
            for number in run..stop {
                let at = begin(number);
                let piece = at.max(wanted.start)..(at + run_bytes).min(wanted.end);
                let len = piece.end - piece.start;
                let source = number * run_bytes + (piece.start - at) - from;
                slice(into, piece.start - wanted.start, len).copy_from_slice(slice(
                    &mut buffer,
                    source,
                    len,
                ));
            }
            run = stop;
        }
        Ok(())
    }

    /// For storages in another order (a transposed matrix): elements in the order of the file.
    fn copy_elements(&self, wanted: &Range<u64>, into: &mut [u8]) -> io::Result<()> {
        let strides = self.strides();
        let element = self.element_bytes();
        let mut ranges: Vec<Range<u64>> = self.sizes.iter().map(|size| 0..*size).collect();
        // Only rows that reach into the range.
        let (row, first) = (strides[0], self.offsets[0]);
        ranges[0].start = (wanted.start / row)
            .saturating_sub(first)
            .min(self.sizes[0]);
        ranges[0].end = wanted
            .end
            .div_ceil(row)
            .saturating_sub(first)
            .min(self.sizes[0]);
        let mut axes: Vec<usize> = (0..self.sizes.len()).collect();
        axes.sort_by_key(|axis| std::cmp::Reverse(self.stored.strides[*axis]));
        if ranges.iter().any(Range::is_empty) {
            return Ok(());
        }
        let mut index: Vec<u64> = ranges.iter().map(|range| range.start).collect();
        let mut window = Window::default();
        loop {
            let (mut target, mut source) = (0, self.stored.first);
            for axis in 0..index.len() {
                target += (self.offsets[axis] + index[axis]) * strides[axis];
                source += index[axis] * self.stored.strides[axis];
            }
            let piece = target.max(wanted.start)..(target + element).min(wanted.end);
            if !piece.is_empty() {
                let bytes = window.at(self, source, element)?;
                let skip = piece.start - target;
                let len = piece.end - piece.start;
                slice(into, piece.start - wanted.start, len)
                    .copy_from_slice(&bytes[length(skip)..length(skip + len)]);
            }
            let next = axes.iter().rev().find(|axis| {
                index[**axis] += 1;
                let more = index[**axis] < ranges[**axis].end;
                if !more {
                    index[**axis] = ranges[**axis].start;
                }
                more
            });
            if next.is_none() {
                return Ok(());
            }
        }
    }
}

/// The part of a storage that is in memory.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn at(&mut self, copy: &BoxCopy<'_>, source: u64, len: u64) -> io::Result<&[u8]> {
        let end = self.start + self.bytes.len() as u64;
        if source < self.start || source + len > end {
            let stop = copy.stored.data.end.min(source + (64 << 10));
            self.bytes.resize(length(stop - source), 0);
            copy.file
                .read_exact_at(&mut self.bytes, copy.item_start + source)?;
            self.start = source;
        }
        let at = length(source - self.start);
        Ok(&self.bytes[at..at + length(len)])
    }
}

/// The first of `count` numbers for which a condition holds that holds for all behind it too; `count` if none.
fn first_where(count: u64, holds: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("parts of a buffer fit in memory")
}

fn slice(bytes: &mut [u8], start: u64, len: u64) -> &mut [u8] {
    &mut bytes[length(start)..length(start + len)]
}
