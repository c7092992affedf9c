//! The way from a download to who writes what it delivers.
//!
//! Like a bounded channel of tokio's, but for this: a delivery takes up room until its receiver says that it was *taken* by who writes
//! it, who may be another process. In between it may wait in more than one queue, and what is only on its way is not in the file yet.
//! **Invariant:** whoever writes takes one delivery at a time, so with the next one taken this one is dealt with.

use std::sync::Arc;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Most deliveries of one download that are sent and not yet taken.
pub const DELIVERIES_WAITING_MAX: usize = 8;

/// The same, as permits are counted.
const ROOM_MAX: u32 = 8;
const _: () = assert!(ROOM_MAX as usize == DELIVERIES_WAITING_MAX);

/// A way for the deliveries of one download.
pub fn way<T>() -> (DeliverySender<T>, DeliveryReceiver<T>) {
    let (sent, received) = unbounded_channel();
    let room = Arc::new(Semaphore::new(DELIVERIES_WAITING_MAX));
    (DeliverySender { sent, room: Arc::clone(&room) }, DeliveryReceiver { received, taker: Taker { room } })
}

/// Where a download puts its deliveries.
#[derive(Debug)]
pub struct DeliverySender<T> {
    sent: UnboundedSender<T>,
    room: Arc<Semaphore>,
}

/// Room for some deliveries, given back when it is dropped.
#[derive(Debug)]
pub struct Room<'a, T> {
    sent: &'a UnboundedSender<T>,
    permits: SemaphorePermit<'a>,
}

/// Nobody receives any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Closed;

impl<T> DeliverySender<T> {
    /// Waits for room for one delivery. Cancelling it loses nothing.
    pub async fn reserve(&self) -> Result<Room<'_, T>, Closed> {
        self.reserve_many(1).await
    }

    /// Waits until everything that was sent is taken.
    pub async fn reserve_all(&self) -> Result<Room<'_, T>, Closed> {
        self.reserve_many(ROOM_MAX).await
    }

    /// Room for one delivery, if there is any now.
    pub fn try_reserve(&self) -> Option<Room<'_, T>> {
        let permits = self.room.try_acquire().ok()?;
        Some(Room { sent: &self.sent, permits })
    }

    /// Sends one and waits for room for it.
    pub async fn send(&self, delivery: T) -> Result<(), Closed> {
        self.reserve().await?.send(delivery);
        Ok(())
    }

    /// How many were sent and are not taken. To be asked with no room reserved.
    pub fn waiting(&self) -> usize {
        DELIVERIES_WAITING_MAX.saturating_sub(self.room.available_permits())
    }

    /// Waits until nobody receives any more.
    pub async fn closed(&self) {
        self.sent.closed().await;
    }

    async fn reserve_many(&self, many: u32) -> Result<Room<'_, T>, Closed> {
        let permits = self.room.acquire_many(many).await.map_err(|_| Closed)?;
        Ok(Room { sent: &self.sent, permits })
    }
}

impl<T> Room<'_, T> {
    /// Sends one delivery and gives back what room is left.
    pub fn send(mut self, delivery: T) {
        if let Some(one) = self.permits.split(1) {
            one.forget();
        }
        // Whom nobody receives from any more learns it when it reserves.
        let _ = self.sent.send(delivery);
    }
}

/// Where deliveries come out.
#[derive(Debug)]
pub struct DeliveryReceiver<T> {
    received: UnboundedReceiver<T>,
    taker: Taker,
}

/// Says of deliveries that they were taken.
#[derive(Clone, Debug)]
pub struct Taker {
    room: Arc<Semaphore>,
}

impl<T> DeliveryReceiver<T> {
    /// The next delivery, taken; `None` when no more will come. Cancelling it loses nothing.
    pub async fn recv(&mut self) -> Option<T> {
        let delivery = self.pass_on().await?;
        self.taker.took();
        Some(delivery)
    }

    /// The next delivery for somebody else, who takes it later: see [`Taker::took`].
    pub async fn pass_on(&mut self) -> Option<T> {
        self.received.recv().await
    }

    /// Says that what was passed on is taken.
    pub fn taker(&self) -> Taker {
        self.taker.clone()
    }
}

impl<T> Drop for DeliveryReceiver<T> {
    fn drop(&mut self) {
        self.taker.room.close();
    }
}

impl Taker {
    /// The oldest delivery that was passed on is taken now.
    pub fn took(&self) {
        if self.room.available_permits() < DELIVERIES_WAITING_MAX {
            self.room.add_permits(1);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A piece that is only on its way to another process must not count as written: it would be read back as zeros.
    #[tokio::test]
    async fn what_is_passed_on_waits_until_it_is_taken() {
        let (out, mut deliveries) = way();
        for delivery in 0..DELIVERIES_WAITING_MAX {
            out.send(delivery).await.unwrap();
            assert_eq!(deliveries.pass_on().await, Some(delivery));
        }
        assert!(out.try_reserve().is_none() && out.waiting() == DELIVERIES_WAITING_MAX);
        deliveries.taker().took();
        out.try_reserve().unwrap().send(9);
        assert_eq!(deliveries.recv().await, Some(9));
        assert_eq!(out.waiting(), DELIVERIES_WAITING_MAX - 1);
        (0..20).for_each(|_| deliveries.taker().took());
        assert_eq!(out.waiting(), 0, "more than was sent cannot be taken");
        drop(out.reserve_all().await.unwrap());
        drop(deliveries);
        assert_eq!(out.send(10).await, Err(Closed));
        out.closed().await;
    }
}
