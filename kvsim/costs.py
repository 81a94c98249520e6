"""What things cost in simulation: the profile, which the real controller's dry run uses as well."""

from __future__ import annotations

from kvcore.scenario.profile import Profile, ProfileError, load_profile

__all__ = ["Profile", "ProfileError", "load_profile"]
