//! Response bodies: blocked, truncated, slow, with or without a length.

use super::Shared;
use super::gate::Gate;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;

const CHUNK_BYTES: usize = 16 * 1024;

/// The content and the way it is sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    pub(super) bytes: Bytes,
    /// No `Content-Length`: chunked.
    pub(super) unsized_body: bool,
    /// The connection is reset after this many bytes.
    pub(super) cut_at: Option<usize>,
    /// A clean end after so many bytes.
    pub(super) ends_at: Option<usize>,
    /// Blocked by a gate after this many bytes.
    pub(super) held_at: Option<(usize, Gate)>,
    /// Bytes a second.
    pub(super) pace: Option<u64>,
}

/// The body that hyper polls, filled by its own task.
pub(super) struct Piped {
    frames: mpsc::Receiver<io::Result<Bytes>>,
    length: Option<u64>,
}

impl Piped {
    pub(super) fn empty() -> Piped {
        Piped {
            frames: mpsc::channel(1).1,
            length: Some(0),
        }
    }

    pub(super) fn send(plan: Plan, shared: Arc<Shared>) -> Piped {
        let (sender, frames) = mpsc::channel(1);
        let sized = !plan.unsized_body && plan.ends_at.is_none();
        let length = sized.then_some(plan.bytes.len() as u64);
        tokio::spawn(plan.play(sender, shared));
        Piped { frames, length }
    }
}

impl Plan {
    async fn play(self, sender: mpsc::Sender<io::Result<Bytes>>, shared: Arc<Shared>) {
        let end = self
            .cut_at
            .or(self.ends_at)
            .unwrap_or(usize::MAX)
            .min(self.bytes.len());
        let mut at = 0;
        let mut held = self.held_at;
        while at < end || held.is_some() {
            if let Some((_, gate)) = held.take_if(|(hold, _)| at >= (*hold).min(end)) {
                tokio::select! {
                    () = gate.pass() => {}
                    () = sender.closed() => return,
                }
                continue;
            }
            let until = held.as_ref().map_or(end, |(at, _)| (*at).min(end));
            let step = self
                .pace
                .map_or(CHUNK_BYTES, |pace| usize::try_from(pace / 20).unwrap().max(1));
            let chunk = self.bytes.slice(at..(at + step).min(until));
            at += chunk.len();
            shared.count_sent(chunk.len());
            if sender.send(Ok(chunk)).await.is_err() {
                return;
            }
            if self.pace.is_some() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        if self.cut_at.is_some_and(|cut| cut < self.bytes.len()) {
            // hyper flushes while the body is pending. An immediate error would discard the buffered bytes.
            tokio::time::sleep(Duration::from_millis(30)).await;
            let _ = sender.send(Err(io::ErrorKind::ConnectionReset.into())).await;
        }
    }
}

impl Body for Piped {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.frames
            .poll_recv(context)
            .map(|frame| frame.map(|bytes| bytes.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
