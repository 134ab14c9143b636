"""Families of generative models side by side: trained alike, measured alike, told in one report with its plots."""
