"""kdx's YAML, as a package, so that an installed kdx finds it from any folder."""
