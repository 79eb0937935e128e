"""Live streams of events to browsers and clients."""
