"""Launchers: rendering a run as the jobs of a cluster. None is here yet; `lcx.mesh` joins what a cluster starts."""
