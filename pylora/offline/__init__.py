"""Work on checkpoints and adapters as files: no model is built, and one tensor at a time is in memory."""
