//! What a vision tower derives from grids alone: taps of the position table, rows, columns, frames.
//!
//! Patches of an image come frame by frame, in blocks of `merge` x `merge`, so that the patches of one merged token
//! stand side by side.

/// Tables of all patches of some grids.
#[derive(Debug, Default)]
pub struct VisionTables {
    /// `[patches][4]`: rows of the learned position table.
    pub taps: Vec<i64>,
    /// `[patches][4]`: the weight of each tap.
    pub weights: Vec<f64>,
    /// `[patches][2]`: row and column within the image.
    pub positions: Vec<i64>,
    /// Patches of each frame; attention stays within one.
    pub frames: Vec<i64>,
}

impl VisionTables {
    /// Interpolates bilinearly, corners aligned, in a learned table of `side` x `side` positions.
    #[must_use]
    pub fn new(grids: &[[i64; 3]], side: i64, merge: i64) -> Self {
        let mut tables = Self::default();
        for &[t, h, w] in grids {
            let (rows, columns) = (axis(h, side), axis(w, side));
            for _ in 0..t {
                tables.frames.push(h * w);
                for (row, column) in block_order(h, w, merge) {
                    tables.push(row, column, &rows, &columns, side);
                }
            }
        }
        tables
    }

    fn push(&mut self, row: i64, column: i64, rows: &[Taps], columns: &[Taps], side: i64) {
        let at = |axis: &[Taps], index: i64| axis[usize::try_from(index).unwrap_or(0)];
        let (r, c) = (at(rows, row), at(columns, column));
        for (r_tap, r_weight) in [(r.low, 1.0 - r.part), (r.high, r.part)] {
            for (c_tap, c_weight) in [(c.low, 1.0 - c.part), (c.high, c.part)] {
                self.taps.push(r_tap * side + c_tap);
                self.weights.push(r_weight * c_weight);
            }
        }
        self.positions.extend([row, column]);
    }
}

/// Two neighbouring places of the learned table and how far a patch lies between them.
#[derive(Debug, Clone, Copy)]
struct Taps {
    low: i64,
    high: i64,
    part: f64,
}

/// Taps of each of `length` patches along one axis.
fn axis(length: i64, side: i64) -> Vec<Taps> {
    let last = (side - 1).max(0);
    let spaces = (length - 1).max(1);
    (0..length)
        .map(|index| {
            let low = index * last / spaces;
            Taps {
                low,
                high: (low + 1).min(last),
                part: to_float(index * last % spaces) / to_float(spaces),
            }
        })
        .collect()
}

/// Grid numbers are far below 2^31, so the conversion is exact.
fn to_float(value: i64) -> f64 {
    f64::from(i32::try_from(value).unwrap_or(i32::MAX))
}

/// Rows and columns of one frame in the order of its patches.
fn block_order(h: i64, w: i64, merge: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..h / merge).flat_map(move |block_row| {
        (0..w / merge).flat_map(move |block_column| {
            (0..merge).flat_map(move |r| {
                (0..merge).map(move |c| (block_row * merge + r, block_column * merge + c))
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corners_of_an_image_are_corners_of_the_table() {
        let tables = VisionTables::new(&[[1, 4, 2]], 8, 2);
        assert_eq!(tables.frames, [8]);
        assert_eq!(tables.taps[0], 0);
        assert_eq!(tables.weights[..4], [1.0, 0.0, 0.0, 0.0]);
        let last = tables.taps.len() - 4;
        assert_eq!(tables.taps[last], 63);
        assert_eq!(tables.positions[2..8], [0, 1, 1, 0, 1, 1]);
    }

    #[test]
    fn frames_repeat_the_same_tables() {
        let tables = VisionTables::new(&[[2, 2, 4]], 8, 2);
        assert_eq!(tables.frames, [8, 8]);
        assert_eq!(tables.taps[..32], tables.taps[32..]);
    }
}
