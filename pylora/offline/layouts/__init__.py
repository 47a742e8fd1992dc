"""Layouts of LoRA files: PEFT's, and those of loralib, kohya's scripts, diffusers and torchtune.

A layout is a module with a `Layout` that reads tensors into `Components` and back; `LAYOUTS` lists them.
"""

from pylora.offline.layouts.layout import Components, Hints, Layout, Source
from pylora.offline.layouts.registry import LAYOUTS, find_layout

__all__ = ["LAYOUTS", "Components", "Hints", "Layout", "Source", "find_layout"]
