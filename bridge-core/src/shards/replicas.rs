//! Parameters that several ranks hold, compared.

use std::collections::HashMap;

use rayon::prelude::*;

use super::set::coordinates;
use super::{ShardSet, ShardSetError};
use crate::checkpoint::TensorSource;
use crate::checkpoint::shard::ShardFile;
use crate::plan::{Copy, Role, TensorPlan};

/// Bytes that are compared at a time.
const BLOCK: usize = 1 << 20;

/// Two tensors that should be equal.
struct Pair<'a> {
    primary: (&'a ShardFile, &'a str),
    replica: (&'a ShardFile, &'a str),
}

impl ShardSet {
    /// Compares every copy of a parameter with the one that [`ShardSet::plan`] reads, byte for byte; gives their number.
    ///
    /// # Errors
    /// [`ShardSetError::Replica`] names the first that differs.
    pub fn compare_replicas(&self) -> Result<usize, ShardSetError> {
        let pairs = self.pairs();
        // The first in the order of the set, whatever the threads do.
        let results: Vec<Result<(), ShardSetError>> = pairs.par_iter().map(Pair::compare).collect();
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(pairs.len())
    }

    fn pairs(&self) -> Vec<Pair<'_>> {
        let mut primaries: HashMap<_, (&ShardFile, &str)> = HashMap::new();
        for part in &self.parts {
            for tensor in part.plan.tensors.iter() {
                if tensor.role == Role::Primary {
                    primaries.insert(content(tensor), (&part.file, &tensor.name));
                }
            }
        }
        let mut pairs = Vec::new();
        for part in &self.parts {
            for tensor in &part.plan.tensors {
                let name = tensor.name.as_str();
                if tensor.role != Role::Primary {
                    let primary = primaries.get(&content(tensor));
                    let primary = *primary.expect("the primaries of all parts cover the model");
                    let replica = (&part.file, name);
                    pairs.push(Pair { primary, replica });
                }
                pairs.extend(part.replicas.iter().map(|file| Pair {
                    primary: (&part.file, name),
                    replica: (file, name),
                }));
            }
        }
        pairs
    }
}

/// What a tensor is made of: two with the same content hold the same bytes.
fn content(tensor: &TensorPlan) -> (Vec<&str>, &[Copy]) {
    let sources = tensor.sources.iter().map(|source| source.name.as_str());
    (sources.collect(), &tensor.copies)
}

impl Pair<'_> {
    fn compare(&self) -> Result<(), ShardSetError> {
        let ((primary, primary_name), (replica, name)) = (self.primary, self.replica);
        // Names and shapes were checked when the set was opened.
        let (Some(expected), Some(found)) = (primary.info(primary_name), replica.info(name)) else {
            return Ok(());
        };
        if expected != found {
            return Err(self.differs(0));
        }
        let element_bytes = expected.dtype.size_bytes();
        let mut blocks = (vec![0; BLOCK], vec![0; BLOCK]);
        let mut offset = 0;
        while offset < expected.num_bytes() {
            let left = expected.num_bytes() - offset;
            let len = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
            let (one, other) = (&mut blocks.0[..len], &mut blocks.1[..len]);
            primary.read(primary_name, offset, one)?;
            replica.read(name, offset, other)?;
            if let Some(at) = one.iter().zip(&*other).position(|(a, b)| a != b) {
                return Err(self.differs((offset + at as u64) / element_bytes as u64));
            }
            offset += len as u64;
        }
        Ok(())
    }

    fn differs(&self, element: u64) -> ShardSetError {
        ShardSetError::Replica {
            name: self.replica.1.to_owned(),
            replica: Box::new(coordinates(self.replica.0.shard())),
            primary_name: self.primary.1.to_owned(),
            primary: Box::new(coordinates(self.primary.0.shard())),
            element,
        }
    }
}
