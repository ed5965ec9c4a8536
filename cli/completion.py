"""Values that a shell completes, read without torch and transformers."""

from minillm.configuration.presets import PRESETS


def preset_names(incomplete: str) -> list[str]:
    """Names of presets that begin so."""
    return [name for name in PRESETS if name.startswith(incomplete)]


def family_names(incomplete: str) -> list[str]:
    """Families of presets that begin so, in the order of `minillm presets`."""
    families = dict.fromkeys(preset.family for preset in PRESETS.values())
    return [family for family in families if family.startswith(incomplete)]
