"""Report: one page that stands alone and says what a trace means for a run."""
