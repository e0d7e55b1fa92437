//! A body that comes from a pipe: an archive, in either direction.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::mpsc;

use crate::archive::pipe::Piece;

/// What comes out of a pipe, as the body of a message. An error breaks the message off.
pub(super) struct Piped {
    pieces: mpsc::Receiver<Piece>,
    /// How much will come, where that is known.
    bytes: Option<u64>,
}

impl Piped {
    pub(super) fn new(pieces: mpsc::Receiver<Piece>, bytes: Option<u64>) -> Self {
        Self { pieces, bytes }
    }
}

impl http_body::Body for Piped {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.pieces
            .poll_recv(context)
            .map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        self.bytes.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
