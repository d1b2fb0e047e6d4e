"""What a run says of itself: progress, events, result, status, and the page."""
