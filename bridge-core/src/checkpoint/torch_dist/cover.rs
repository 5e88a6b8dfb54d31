//! Whether chunks make up a tensor: boxes that are disjoint and leave nothing out.

use std::ops::Range;

/// An axis-aligned box: a range an axis.
type Bounds = Vec<Range<u64>>;

/// Boxes beyond which an arrangement that no plane divides is not looked into.
const MAX_ENTANGLED: usize = 512;

/// Why boxes do not make up a region.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Cover {
    Overlap,
    Gap,
    /// Cut so irregularly that checking it would take long. No sharding does that.
    Irregular,
}

/// Checks that `boxes`, none of them empty, make up a tensor of the given shape exactly once.
///
/// Shardings are guillotine cuts (grids, uneven ones too), so the region is cut along the planes that no box crosses,
/// until every part holds one box. What no plane divides is compared pair by pair, up to a limit.
pub(super) fn check(shape: &[usize], boxes: Vec<Bounds>) -> Result<(), Cover> {
    let region: Bounds = shape.iter().map(|size| 0..*size as u64).collect();
    let mut work = boxes.len() * 64 + 4096;
    let mut open = vec![(region, boxes)];
    while let Some((region, boxes)) = open.pop() {
        work = work
            .checked_sub(boxes.len().max(1))
            .ok_or(Cover::Irregular)?;
        if boxes.is_empty() {
            return Err(Cover::Gap);
        }
        if boxes.len() == 1 {
            if boxes[0] != region {
                return Err(Cover::Gap);
            }
            continue;
        }
        if boxes.windows(2).all(|pair| pair[0] == pair[1]) {
            return Err(Cover::Overlap);
        }
        divide(region, boxes, &mut open)?;
    }
    Ok(())
}

/// Pushes the parts of a region along the first axis that some plane cuts.
fn divide(
    region: Bounds,
    mut boxes: Vec<Bounds>,
    open: &mut Vec<(Bounds, Vec<Bounds>)>,
) -> Result<(), Cover> {
    for axis in 0..region.len() {
        boxes.sort_by_key(|bounds| bounds[axis].start);
        let cuts = cuts(&boxes, axis);
        if cuts.is_empty() {
            continue;
        }
        let mut start = region[axis].start;
        let mut parts = Vec::with_capacity(cuts.len() + 1);
        for cut in cuts.into_iter().rev() {
            parts.push(boxes.split_off(cut));
        }
        parts.push(boxes);
        for part in parts.into_iter().rev() {
            let part_end = part
                .iter()
                .map(|bounds| bounds[axis].end)
                .max()
                .unwrap_or(start);
            if part[0][axis].start != start {
                return Err(Cover::Gap);
            }
            let mut bounds = region.clone();
            bounds[axis] = start..part_end;
            start = part_end;
            open.push((bounds, part));
        }
        return if start == region[axis].end {
            Ok(())
        } else {
            Err(Cover::Gap)
        };
    }
    entangled(&region, &boxes)
}

/// Where, in boxes sorted by their start on `axis`, a plane has all earlier ones on one side.
fn cuts(boxes: &[Bounds], axis: usize) -> Vec<usize> {
    let mut cuts = Vec::new();
    let mut end = boxes[0][axis].end;
    for (number, bounds) in boxes.iter().enumerate().skip(1) {
        if bounds[axis].start >= end {
            cuts.push(number);
        }
        end = end.max(bounds[axis].end);
    }
    cuts
}

fn entangled(region: &Bounds, boxes: &[Bounds]) -> Result<(), Cover> {
    if boxes.len() > MAX_ENTANGLED {
        return Err(Cover::Irregular);
    }
    for (number, a) in boxes.iter().enumerate() {
        for b in &boxes[..number] {
            let disjoint = a
                .iter()
                .zip(b)
                .any(|(a, b)| a.end <= b.start || b.end <= a.start);
            if !disjoint {
                return Err(Cover::Overlap);
            }
        }
    }
    // The shape's product was checked, and every box lies in the shape.
    let volume = |bounds: &Bounds| -> u64 { bounds.iter().map(|r| r.end - r.start).product() };
    if boxes.iter().map(volume).sum::<u64>() == volume(region) {
        Ok(())
    } else {
        Err(Cover::Gap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(rows: Range<u64>, columns: Range<u64>) -> Bounds {
        vec![rows, columns]
    }

    #[test]
    fn grids_uneven_cuts_and_pinwheels_make_up_a_tensor() {
        let grid = vec![
            rect(0..2, 0..3),
            rect(2..4, 0..3),
            rect(2..4, 3..5),
            rect(0..2, 3..5),
        ];
        assert_eq!(check(&[4, 5], grid), Ok(()));
        let bricks = vec![
            rect(0..1, 0..2),
            rect(0..1, 2..5),
            rect(1..4, 0..4),
            rect(1..4, 4..5),
        ];
        assert_eq!(check(&[4, 5], bricks), Ok(()));
        let pinwheel = vec![
            rect(0..1, 0..2),
            rect(0..2, 2..3),
            rect(2..3, 1..3),
            rect(1..3, 0..1),
            rect(1..2, 1..2),
        ];
        assert_eq!(check(&[3, 3], pinwheel), Ok(()));
        assert_eq!(check(&[], vec![vec![]]), Ok(()));
    }

    #[test]
    fn overlaps_and_gaps_are_found() {
        assert_eq!(check(&[2], vec![]), Err(Cover::Gap));
        assert_eq!(check(&[4], vec![vec![0..2], vec![3..4]]), Err(Cover::Gap));
        assert_eq!(check(&[4], vec![vec![0..2], vec![2..3]]), Err(Cover::Gap));
        assert_eq!(
            check(&[4], vec![vec![0..3], vec![2..4]]),
            Err(Cover::Overlap)
        );
        assert_eq!(
            check(&[4], vec![vec![0..4], vec![0..4]]),
            Err(Cover::Overlap)
        );
        assert_eq!(check(&[], vec![vec![], vec![]]), Err(Cover::Overlap));
        let holed = vec![
            rect(0..1, 0..2),
            rect(0..2, 2..3),
            rect(2..3, 1..3),
            rect(1..3, 0..1),
        ];
        assert_eq!(check(&[3, 3], holed), Err(Cover::Gap));
    }

    #[test]
    fn a_hundred_thousand_hostile_boxes_are_refused_quickly() {
        let many = 100_000;
        let stacked = (0..many)
            .map(|i| std::iter::once(i..many + i).collect())
            .collect();
        assert_eq!(check(&[200_000], stacked), Err(Cover::Irregular));
        // A spiral of cuts that each split off one box.
        let spiral = (0..many).map(|i| rect(i..i + 1, 0..many - i)).collect();
        assert!(check(&[100_000, 100_000], spiral).is_err());
    }
}
