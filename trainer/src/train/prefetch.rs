//! Preprocessing ahead of the step, in background threads.
//!
//! A dispatcher hands rows to workers and puts a ticket a step into a bounded queue; the loop redeems tickets in order. So
//! results depend neither on the number of threads nor on their speed, and memory is bounded by the queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::order::{Place, Step};

/// What the workers do with a row.
pub(crate) type Encode<T, E> = Arc<dyn Fn(usize) -> Result<T, E> + Send + Sync>;

/// A row's result, or `None` when its thread failed.
pub(crate) type Encoded<T, E> = (usize, Option<Result<T, E>>);

/// A step whose rows are ready.
#[derive(Debug)]
pub(crate) struct Ready<T, E> {
    /// Where the step stands in the data.
    pub place: Place,
    /// Whether it is the last of its epoch.
    pub ends_epoch: bool,
    /// One entry a forward pass, with each row's result in order.
    pub passes: Vec<Vec<Encoded<T, E>>>,
}

type Task<T, E> = (usize, Sender<Option<Result<T, E>>>);
type Ticket<T, E> = (
    Place,
    bool,
    Vec<Vec<(usize, Receiver<Option<Result<T, E>>>)>>,
);

/// Steps being prepared.
pub(crate) struct Prefetch<T, E> {
    tickets: Option<Receiver<Ticket<T, E>>>,
    threads: Vec<JoinHandle<()>>,
}

impl<T: Send + 'static, E: Send + 'static> Prefetch<T, E> {
    /// Starts `workers` threads that keep `ahead` steps of `steps` ready.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub(crate) fn start(
        steps: impl Iterator<Item = (Place, bool, Step)> + Send + 'static,
        encode: &Encode<T, E>,
        workers: usize,
        ahead: usize,
    ) -> std::io::Result<Self> {
        let (task_sender, task_receiver) = unbounded::<Task<T, E>>();
        let (ticket_sender, ticket_receiver) = bounded::<Ticket<T, E>>(ahead);
        let mut threads = Vec::new();
        for worker in 0..workers {
            let (tasks, encode) = (task_receiver.clone(), Arc::clone(encode));
            let work = move || {
                for (row, result) in tasks {
                    // A decoder that panics on a broken file must not end the run; the row is reported.
                    let encoded = catch_unwind(AssertUnwindSafe(|| encode(row))).ok();
                    // Nobody waits any more when the run ends early.
                    let _ = result.send(encoded);
                }
            };
            threads.push(
                Builder::new()
                    .name(format!("preprocess-{worker}"))
                    .spawn(work)?,
            );
        }
        let dispatch = move || {
            for (place, ends_epoch, step) in steps {
                let mut tasks = Vec::new();
                let mut redeem = |row: usize| {
                    let (sender, receiver) = bounded(1);
                    tasks.push((row, sender));
                    (row, receiver)
                };
                let passes = step
                    .into_iter()
                    .map(|pass| pass.into_iter().map(&mut redeem).collect())
                    .collect();
                // The ticket first: this blocks while enough steps are on their way.
                if ticket_sender.send((place, ends_epoch, passes)).is_err() {
                    return;
                }
                for task in tasks {
                    if task_sender.send(task).is_err() {
                        return;
                    }
                }
            }
        };
        threads.push(Builder::new().name("dispatch".to_owned()).spawn(dispatch)?);
        Ok(Self {
            tickets: Some(ticket_receiver),
            threads,
        })
    }
}

impl<T, E> Iterator for Prefetch<T, E> {
    type Item = Ready<T, E>;

    /// Waits for the next step; `None` behind the last one.
    fn next(&mut self) -> Option<Ready<T, E>> {
        let (place, ends_epoch, passes) = self.tickets.as_ref()?.recv().ok()?;
        let redeem = |(row, result): (usize, Receiver<Option<Result<T, E>>>)| {
            (row, result.recv().ok().flatten())
        };
        let passes = passes
            .into_iter()
            .map(|pass| pass.into_iter().map(redeem).collect())
            .collect();
        Some(Ready {
            place,
            ends_epoch,
            passes,
        })
    }
}

impl<T, E> Drop for Prefetch<T, E> {
    fn drop(&mut self) {
        // The dispatcher ends when nobody takes tickets, the workers when nobody hands out rows.
        self.tickets = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::RunConfig;
    use super::super::order::Order;
    use super::*;

    fn rows(workers: usize) -> Vec<Vec<Option<Result<usize, String>>>> {
        let config = RunConfig {
            per_device_train_batch_size: 3,
            gradient_accumulation_steps: 2,
            ..RunConfig::default()
        };
        let order = Order::new(&config, (0..50).collect(), None);
        let encode: Encode<usize, String> = Arc::new(|row| match row {
            7 => Err("row 7 is bad".to_owned()),
            8 => panic!("a decoder failed"),
            _ => Ok(row * 10),
        });
        let prefetch = Prefetch::start(order.steps_from(4).take(12), &encode, workers, 2).unwrap();
        prefetch
            .map(|ready| {
                ready
                    .passes
                    .into_iter()
                    .flatten()
                    .map(|(_, result)| result)
                    .collect()
            })
            .collect()
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let one = rows(1);
        assert_eq!(one.len(), 12);
        assert_eq!(one, rows(4));
        let failed = one
            .iter()
            .flatten()
            .filter(|result| result.is_none())
            .count();
        assert!(failed >= 1, "the panic of row 8 is a result, not the end");
    }

    #[test]
    fn a_run_that_ends_early_leaves_no_thread_behind() {
        let order = Order::new(&RunConfig::default(), (0..50).collect(), None);
        let encode: Encode<usize, String> = Arc::new(Ok);
        let mut prefetch = Prefetch::start(order.steps_from(0), &encode, 2, 2).unwrap();
        assert!(prefetch.next().is_some());
        drop(prefetch);
    }
}
