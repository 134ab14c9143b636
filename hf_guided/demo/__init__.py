"""The page of `hf-guided demo`: what it shows, and which requests it computes. It only calls the rooms before it."""

from .page import build_demo, launch_demo

__all__ = ["build_demo", "launch_demo"]
