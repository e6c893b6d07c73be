"""Files of the Hugging Face Hub, or of what NANOGPT_MIRROR puts in its place: a folder, or the URL of a server like it."""
import os
from pathlib import Path


def mirror_folder(name):
    """The folder that stands for the repository `name` where NANOGPT_MIRROR is a folder, else None. Raises OSError."""
    mirror = os.environ.get('NANOGPT_MIRROR', '')
    if not mirror or '://' in mirror:
        return None
    if not (folder := Path(mirror) / name).is_dir():
        raise FileNotFoundError(f"NANOGPT_MIRROR={mirror} has no folder {name}")
    return folder


def download(repo, file, revision=None, repo_type='model'):
    """The path of a repository's file in the Hub's cache, in a folder whose name is the commit; None: it has no such file.

    revision: a commit, a tag or a branch; None: main, as the cache has it where there is no network. Raises OSError.
    """
    from huggingface_hub import errors, hf_hub_download, logging
    logging.set_verbosity_error()   # it would tell of each retry
    endpoint = os.environ.get('NANOGPT_MIRROR') or None
    try:
        return Path(hf_hub_download(repo, file, repo_type=repo_type, revision=revision, endpoint=endpoint))
    except errors.LocalEntryNotFoundError:      # which is an EntryNotFoundError too
        raise OSError(f"cannot download {file} of {repo}: no answer, and the Hub's cache does not have it") from None
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError:
        raise OSError(f"{repo} is open only to those who accepted its terms: do that on its page, then `hf auth login`"
                      ) from None
    except errors.RepositoryNotFoundError:
        raise OSError(f"the Hugging Face Hub has no {repo_type} {repo!r}, or it is private: `hf auth login`") from None
    except Exception as error:      # the library raises its own errors and those of two HTTP libraries
        raise OSError(f"cannot download {file} of {repo} ({type(error).__name__}): check the network, or set "
                      "NANOGPT_MIRROR to a folder or URL that has it") from None
