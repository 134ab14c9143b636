"""The demo of `hf-guided demo`: the Gradio page, and limits on its requests. It only calls the rooms before it."""

from .page import build_demo, launch_demo

__all__ = ["build_demo", "launch_demo"]
