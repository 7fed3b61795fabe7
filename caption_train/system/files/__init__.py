"""Files: written whole or not at all, read although anybody may have written them. Standard library only."""

from caption_train.system.files.appending import AppendedRows, parse_rows
from caption_train.system.files.kept import Kept, cache_folder, list_kept, remove_least_used
from caption_train.system.files.names import behind_link, find_free_name, find_matching, follow_pointer
from caption_train.system.files.reading import (
    MAX_BYTES,
    TooLarge,
    hash_file,
    open_own,
    opening_regular_file,
    parse_json,
    read_json_object,
    read_regular_file,
    read_text_lines,
)
from caption_train.system.files.writing import (
    TEMPORARY,
    apply_umask,
    clear_temporary,
    copy_atomically,
    fcntl,
    finish_temporary,
    mode_of,
    open_atomically,
    open_temporary,
    sync,
    sync_folder,
    write_atomically,
)

__all__ = [
    "MAX_BYTES",
    "TEMPORARY",
    "AppendedRows",
    "Kept",
    "TooLarge",
    "apply_umask",
    "behind_link",
    "cache_folder",
    "clear_temporary",
    "copy_atomically",
    "fcntl",
    "find_free_name",
    "find_matching",
    "finish_temporary",
    "follow_pointer",
    "hash_file",
    "list_kept",
    "mode_of",
    "open_atomically",
    "open_own",
    "open_temporary",
    "opening_regular_file",
    "parse_json",
    "parse_rows",
    "read_json_object",
    "read_regular_file",
    "read_text_lines",
    "remove_least_used",
    "sync",
    "sync_folder",
    "write_atomically",
]
