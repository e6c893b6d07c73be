"""Files of the Hugging Face Hub, or of the folder or server that NANOGPT_MIRROR names instead."""

import contextlib
import os
from pathlib import Path


def mirror_folder(name):
    """The folder of the repository `name` if NANOGPT_MIRROR is a folder, else None.

    Raises FileNotFoundError if the mirror lacks it.
    """
    mirror = os.environ.get('NANOGPT_MIRROR', '')
    if not mirror or '://' in mirror:
        return None
    folder = Path(mirror) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"NANOGPT_MIRROR={mirror} has no folder {name}")
    return folder


def download(repo, file, revision=None, repo_type='model', folder=None):
    """Download a repository's file; returns its path, or None if the repository has no such file.

    The file is in the Hub's cache, in a folder whose name is the commit; or in `folder`, if given,
    and then there is no progress bar. revision: a commit, tag or branch; None is the main branch,
    or what the cache has of it where there is no network. Raises OSError.
    """
    from huggingface_hub import errors, hf_hub_download, utils

    if folder:
        utils.disable_progress_bars()
    try:
        with _one_line_errors(repo, repo_type, f"download {file} of {repo}"):
            path = hf_hub_download(
                repo,
                file,
                repo_type=repo_type,
                revision=revision,
                endpoint=_endpoint(),
                local_dir=folder,
            )
    except errors.EntryNotFoundError:
        return None
    return Path(path)


def listing(repo, revision=None):
    """(commit, {file: bytes}) of a dataset at `revision`. Raises OSError."""
    from huggingface_hub import HfApi

    with _one_line_errors(repo, 'dataset', f"list the files of {repo}"):
        api = HfApi(endpoint=_endpoint())
        info = api.dataset_info(repo, revision=revision, files_metadata=True)
        return info.sha, {file.rfilename: file.size or 0 for file in info.siblings}


def _endpoint():
    return os.environ.get('NANOGPT_MIRROR') or None


@contextlib.contextmanager
def _one_line_errors(repo, repo_type, task):
    """Turn the library's many errors into OSError with one line, apart from EntryNotFoundError.

    task: what could not be done, as in "download FILE of REPO".
    """
    from huggingface_hub import errors, logging

    logging.set_verbosity_error()  # the library would print each retry
    try:
        yield
    except errors.LocalEntryNotFoundError:  # a subclass of EntryNotFoundError: there is no network
        raise OSError(f"cannot {task}: no answer, and the Hub's cache does not have it") from None
    except errors.EntryNotFoundError:
        raise
    except errors.GatedRepoError:
        raise OSError(
            f"{repo} is open only to those who accepted its terms: do that on its page, then run "
            "`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise OSError(
            f"the Hugging Face Hub has no {repo_type} {repo!r}, or it is private: run "
            "`hf auth login`"
        ) from None
    except Exception as error:  # the library raises its own errors and those of two HTTP libraries
        response = getattr(error, 'response', None)
        status = getattr(response, 'status_code', None)
        if status == 404:
            raise OSError(f"cannot {task}: there is no such {repo_type}") from None
        reason = f"HTTP {status}" if status else type(error).__name__
        raise OSError(
            f"cannot {task} ({reason}): check the network, or set NANOGPT_MIRROR to a folder or "
            "URL that has it"
        ) from None
