"""Fake secrets, put together at run time: none stands in a file of this project."""

SECRETS = {
    "hub token": "hf_" + "aB3dE6gH" * 4,
    "API key": "sk-" + "proj-" + "9xYz" * 8,
    "AWS key": "AKIA" + "Q7R8S9T0" * 2,
    "GitHub token": "ghp_" + "k4L5m6N7" * 5,
    "password in a URL": "s3cr" + "et-pass",
}
URL = f"https://robot:{SECRETS['password in a URL']}@git.example.org/team/repo.git"


def shown(name: str) -> str:
    """Return the secret as it may stand in a text."""
    return URL if name == "password in a URL" else SECRETS[name]
