"""Other libraries, imported on demand."""
