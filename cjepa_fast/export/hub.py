"""An export to Hugging Face's hub: one commit, the model card as its README.md."""

import re
from pathlib import Path

from cjepa_fast.runtime.version import VERSION
from cjepa_fast.telemetry.progress import shown_clock

README = "README.md"
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check(name: str) -> None:
    """Before anything is exported. Raises ValueError for what is no USER/NAME, without
    huggingface_hub, and without a token."""
    if not NAME.fullmatch(name):
        raise ValueError(f"--push {name}: write it as USER/NAME, as the hub names a model")
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise ValueError(
            f"--push {name} needs huggingface_hub: pip install '.[hub]'; or leave --push out"
        ) from None
    if not get_token():
        raise ValueError(
            f"--push {name}: no token of the hub is known here: set HF_TOKEN, or run "
            "`hf auth login`"
        )


def push(folder: Path, name: str, card: str, public: bool = False) -> str:
    """All files of `folder` to the model `name`, which is made if missing, as one commit. Returns
    the address.

    card: the file that becomes README.md, unless the hub has one, which may have been edited. A new
    model is private unless `public`; one that is there stays as it is. Raises ValueError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        with shown_clock(f"push to {name}"):
            api = HfApi()
            api.create_repo(name, repo_type="model", private=not public, exist_ok=True)
            as_readme = not api.file_exists(name, README)
            operations = [
                CommitOperationAdd(
                    path_in_repo=README
                    if as_readme and path.name == card
                    else path.relative_to(folder).as_posix(),
                    path_or_fileobj=str(path),
                )
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]
            made = api.create_commit(
                name, operations, commit_message=f"Export of cjepa_fast {VERSION}"
            )
    except Exception as error:  # of the network, the service, the account: its words tell
        raise ValueError(
            f"--push {name}: {type(error).__name__}: {error}\n"
            f"the export is whole in {folder}: send it with `hf upload {name} {folder}`"
        ) from error
    return made.commit_url
