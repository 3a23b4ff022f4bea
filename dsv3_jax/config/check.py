"""How the project refuses what a user gave it."""


class UserError(Exception):
    """Something the user can mend: the message gives value, rule and remedy. Programs exit with code 2 on it."""


class ConfigError(UserError, ValueError):
    """A configuration that contradicts itself or the data it meets."""


def check(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
