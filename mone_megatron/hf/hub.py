"""Uploads an export to the Hugging Face Hub, or to the server that ``HF_ENDPOINT`` names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,  # of the HTTP library that this release has
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

_OPTION = "--push-to-hub"
# What a new repository holds.
_OF_THE_HUB = {".gitattributes"}


@dataclass(frozen=True)
class HubRepository:
    """Describes where an export is to go: a repository that is not there yet, or is empty.

    Attributes:
        name: ``OWNER/NAME``.
        private: whether only its owners may see it.
        endpoint: the server's address.
    """

    name: str
    private: bool
    endpoint: str

    @property
    def address(self) -> str:
        """Returns where people find it."""
        return f"{self.endpoint}/{self.name}"


def find_repository(name: str, *, private: bool) -> HubRepository:
    """Checks that an export can go to a repository; asks the server, and changes nothing there.

    Args:
        name: ``OWNER/NAME``.
        private: whether only its owners may see it.

    Raises:
        ValueError: the name is none, there is no token or it may not write there, the server does
            not answer, or the repository holds files or is as visible as was not asked for.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{_OPTION}: {_told(error)}") from None
    owner, slash, _ = name.partition("/")
    if not slash:
        raise ValueError(f"{_OPTION}: {name!r} names no owner; give it as OWNER/NAME")
    if constants.is_offline_mode():
        raise ValueError(f"{_OPTION}: HF_HUB_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise ValueError(
            f"{_OPTION}: there is no token; set HF_TOKEN, or log in with `hf auth login`"
        )
    api = HfApi()
    try:
        _check_token(api, owner)
        _check_empty(api, name, private=private)
    except (HTTPError, OSError) as error:
        raise ValueError(f"{_OPTION}: {api.endpoint}: {_told(error)}") from None
    return HubRepository(name, private, api.endpoint)


def _check_token(api: HfApi, owner: str) -> None:
    """Refuses a token that may not write what is the owner's."""
    known = api.whoami()
    owners = [known["name"], *(each["name"] for each in known.get("orgs", []))]
    if owner not in owners:
        raise ValueError(
            f"{_OPTION}: the token is {known['name']}'s, who is not in {owner}; use one of "
            f"{', '.join(owners)} as OWNER"
        )
    if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"{_OPTION}: the token may only read; make one that may write, at "
            f"{api.endpoint}/settings/tokens"
        )


def _check_empty(api: HfApi, name: str, *, private: bool) -> None:
    """Refuses a repository that holds files, or is not as private as it is to be."""
    try:
        found = api.model_info(name)
    except RepositoryNotFoundError:
        return
    files = sorted({file.rfilename for file in found.siblings or []} - _OF_THE_HUB)
    if files:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise ValueError(
            f"{_OPTION}: {name} is there and holds {files[0]}{more}; give a new name, or delete "
            "what is there"
        )
    if bool(found.private) != private:
        seen, fix = ("private", "leave --public out") if found.private else ("public", "--public")
        raise ValueError(f"{_OPTION}: {name} is there and {seen}; {fix}, or change it on the Hub")


def upload(folder: Path, repository: HubRepository, message: str) -> None:
    """Uploads every file of an export, making the repository where it is not there.

    Args:
        folder: the export.
        repository: from :func:`find_repository`.
        message: of the commit.

    Raises:
        ValueError: the server refused, it made a repository that everybody sees, or the connection
            broke; the export stays.
    """
    api = HfApi()
    try:
        api.create_repo(repository.name, private=repository.private, exist_ok=True)
        # Somebody may have been faster, and not every server keeps repositories private.
        _check_empty(api, repository.name, private=repository.private)
        api.upload_folder(repo_id=repository.name, folder_path=folder, commit_message=message)
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"{_OPTION}: {repository.address}: {_told(error)}; the export is whole in {folder}, "
            f"upload it later: hf upload {repository.name} {folder}"
        ) from None


def _told(error: Exception) -> str:
    """Returns a library's error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
