"""Files of the Hugging Face Hub, or of what NANOGPT_MIRROR puts in its place: a folder, or the URL
of a server like it."""

import contextlib
import os
from pathlib import Path


def mirror_folder(name):
    """The folder that stands for the repository `name` where NANOGPT_MIRROR is a folder, else None.
    Raises OSError."""
    mirror = os.environ.get('NANOGPT_MIRROR', '')
    if not mirror or '://' in mirror:
        return None
    if not (folder := Path(mirror) / name).is_dir():
        raise FileNotFoundError(f"NANOGPT_MIRROR={mirror} has no folder {name}")
    return folder


def download(repo, file, revision=None, repo_type='model', folder=None):
    """The path of a repository's file in the Hub's cache, in a folder whose name is the commit;
    None: it has no such file.

    revision: a commit, a tag or a branch; None: main, as the cache has it where there is no
    network. folder: where to put it in place of the cache, without a progress bar. Raises OSError.
    """
    from huggingface_hub import errors, hf_hub_download, utils

    if folder:
        utils.disable_progress_bars()
    try:
        with _errors_said(repo, repo_type, f"download {file} of {repo}"):
            return Path(
                hf_hub_download(
                    repo,
                    file,
                    repo_type=repo_type,
                    revision=revision,
                    endpoint=_endpoint(),
                    local_dir=folder,
                )
            )
    except errors.EntryNotFoundError:
        return None


def listing(repo, revision=None):
    """(commit, {file: bytes}) of a dataset. Raises OSError."""
    from huggingface_hub import HfApi

    with _errors_said(repo, 'dataset', f"ask for the files of {repo}"):
        found = HfApi(endpoint=_endpoint()).dataset_info(
            repo, revision=revision, files_metadata=True
        )
        return found.sha, {file.rfilename: file.size or 0 for file in found.siblings}


def _endpoint():
    return os.environ.get('NANOGPT_MIRROR') or None


@contextlib.contextmanager
def _errors_said(repo, repo_type, what):
    """The library's errors, which are many, as OSError with one line; that there is no such file
    stays what it is."""
    from huggingface_hub import errors, logging

    logging.set_verbosity_error()  # it would tell of each retry
    try:
        yield
    except errors.LocalEntryNotFoundError:  # which is an EntryNotFoundError too
        raise OSError(f"cannot {what}: no answer, and the Hub's cache does not have it") from None
    except errors.EntryNotFoundError:
        raise
    except errors.GatedRepoError:
        raise OSError(
            f"{repo} is open only to those who accepted its terms: do that on its page, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise OSError(
            f"the Hugging Face Hub has no {repo_type} {repo!r}, or it is private: `hf auth login`"
        ) from None
    except Exception as error:  # the library raises its own errors and those of two HTTP libraries
        if (status := getattr(getattr(error, 'response', None), 'status_code', None)) == 404:
            raise OSError(f"cannot {what}: there is no such {repo_type}") from None
        reason = f"HTTP {status}" if status else type(error).__name__
        raise OSError(
            f"cannot {what} ({reason}): check the network, or set NANOGPT_MIRROR to a folder or "
            "URL that has it"
        ) from None
