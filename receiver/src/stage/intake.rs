//! Waiting at the gate: a stream's place, and who of those who wait is let in.

use std::sync::Arc;

use common::ids::VolumeId;

use super::error::StageError;
use super::gate::{self, Intake};
use super::{Shared, Stage};

impl Stage {
    /// A volume's place at the intake gate; one for each of its streams.
    #[must_use]
    pub fn intake_of(&self, volume: VolumeId) -> VolumeIntake {
        self.shared.lock().connected.enter(volume);
        VolumeIntake { shared: Arc::clone(&self.shared), volume }
    }
}

/// One stream's place at the gate. Dropping it says that the stream is gone.
pub struct VolumeIntake {
    shared: Arc<Shared>,
    volume: VolumeId,
}

impl VolumeIntake {
    /// Waits until a record of the volume may be read from its peer and submitted. Safe to cancel.
    ///
    /// # Errors
    /// The stage's failure, if it failed.
    pub async fn admit(&self) -> Result<(), StageError> {
        let marks = self.shared.config.marks();
        if matches!(*self.shared.intake.borrow(), Intake::Open) {
            return Ok(());
        }
        let mut changes = self.shared.intake.subscribe();
        let _place = Place::new(self);
        loop {
            let intake = changes.borrow_and_update().clone();
            let used = self.shared.lock().index.used_bytes();
            if gate::admits(&intake, &marks, used, self.volume)? {
                return Ok(());
            }
            if changes.changed().await.is_err() {
                return Err(StageError::Stopped);
            }
        }
    }

    /// Done once the stage is full and goes on with another volume first, one for which `by` is true. Safe to cancel.
    pub async fn passed_over(&self, by: impl Fn(VolumeId) -> bool + Send) {
        let mut changes = self.shared.intake.subscribe();
        let passed = changes.wait_for(|now| match now {
            Intake::Full { favoured: Some(other) } => *other != self.volume && by(*other),
            _ => false,
        });
        if passed.await.is_err() {
            // The stage is gone, which whoever waits to be admitted is told.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for VolumeIntake {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.connected.leave(self.volume);
        if state.connected.contains(self.volume) {
            return;
        }
        let cleared = self.shared.intake.send_if_modified(|now| match now {
            Intake::Full { favoured } if *favoured == Some(self.volume) => {
                *favoured = None;
                true
            }
            _ => false,
        });
        if cleared {
            self.shared.update_gate(&mut state, false);
        }
    }
}

/// Counted among those who wait, as long as it lives.
struct Place<'a>(&'a VolumeIntake);

impl<'a> Place<'a> {
    fn new(intake: &'a VolumeIntake) -> Self {
        let mut state = intake.shared.lock();
        state.waiting.enter(intake.volume);
        intake.shared.update_gate(&mut state, false);
        Self(intake)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.shared.lock().waiting.leave(self.0.volume);
    }
}
