//! The learning rate of each step.

use super::config::{RunConfig, SchedulerType};

/// Linear warm-up, then constant, a line or half a cosine down to a fraction of the highest rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Schedule {
    kind: SchedulerType,
    peak: f64,
    min_ratio: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// The schedule of a run of `total_steps`. `warmup_ratio` counts of all steps, rounded up as transformers does.
    #[must_use]
    pub(crate) fn new(config: &RunConfig, total_steps: u64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a ratio in 0..=1 of a step count, rounded up"
        )]
        let from_ratio = (config.warmup_ratio * total_steps as f64).ceil() as u64;
        Self {
            kind: config.lr_scheduler_type,
            peak: config.learning_rate,
            min_ratio: config.min_lr_ratio,
            warmup_steps: if config.warmup_steps > 0 {
                config.warmup_steps
            } else {
                from_ratio
            },
            total_steps,
        }
    }

    /// The learning rate of the step with this index (the first is 0).
    ///
    /// Step `s` of a warm-up of `w` steps has `(s + 1) / w` of the peak, so the first step already learns. The decay begins
    /// behind the warm-up and would reach its floor at `total_steps`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "step counts are far below 2^52")]
    pub(crate) fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let length = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / length as f64).min(1.0);
        let factor = match self.kind {
            SchedulerType::Constant => 1.0,
            SchedulerType::Linear => self.min_ratio + (1.0 - self.min_ratio) * (1.0 - progress),
            SchedulerType::Cosine => {
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
                self.min_ratio + (1.0 - self.min_ratio) * cosine
            }
        };
        self.peak * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(kind: SchedulerType, warmup_steps: u64, min_lr_ratio: f64) -> Vec<f64> {
        let config = RunConfig {
            learning_rate: 2.0,
            lr_scheduler_type: kind,
            warmup_steps,
            min_lr_ratio,
            ..RunConfig::default()
        };
        let schedule = Schedule::new(&config, 10);
        (0..=10).map(|step| schedule.learning_rate(step)).collect()
    }

    #[test]
    fn warm_up_rises_in_a_line_and_its_first_step_learns() {
        assert_eq!(
            rates(SchedulerType::Constant, 4, 0.0)[..5],
            [0.5, 1.0, 1.5, 2.0, 2.0]
        );
    }

    #[test]
    fn linear_and_cosine_fall_from_the_peak_to_the_floor() {
        let linear = rates(SchedulerType::Linear, 0, 0.1);
        assert_eq!(linear[0], 2.0);
        assert!((linear[5] - 1.1).abs() < 1e-12);
        assert!((linear[10] - 0.2).abs() < 1e-12);
        let cosine = rates(SchedulerType::Cosine, 2, 0.1);
        assert_eq!(cosine[2], 2.0);
        assert!((cosine[6] - 1.1).abs() < 1e-12);
        assert!((cosine[10] - 0.2).abs() < 1e-12);
    }

    #[test]
    fn warm_up_ratio_counts_of_all_steps_rounded_up() {
        let config = RunConfig {
            warmup_ratio: 0.25,
            learning_rate: 3.0,
            ..RunConfig::default()
        };
        assert_eq!(Schedule::new(&config, 10).learning_rate(0), 1.0);
    }
}
