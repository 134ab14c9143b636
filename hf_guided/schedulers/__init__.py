"""How noise is added and removed: the scheduler, its tables, and handing over to diffusers' own. No models."""
