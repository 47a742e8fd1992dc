"""Models with adapters: injection, lifecycle, the tuner `LoraModel` and what users hold, `PeftModel`."""
