"""Images sorted into folders by class, as ImageNet is: <folder>/<class>/.../image.jpg."""
from __future__ import annotations

import os
from typing import Sequence

from data.folder import FolderPairs, PackedStrings, Skipped, list_files
from utils.errors import UserError
from utils.files import IMAGE_SUFFIXES


def class_names(folder: str) -> list[str]:
    """The classes of a folder: the names of its subfolders, sorted. Raises UserError if there are none."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read as a folder of classes: {error.strerror or error}"
        ) from None
    if not names:
        raise UserError(f"{folder} has no subfolders: give one with a folder of images for each class")
    return names


def list_class_images(folder: str, classes: Sequence[str]) -> FolderPairs:
    """Find the images of these classes; an image's "caption" is the name of its class.

    classes: the names to look for. Empty (for an unconditional model): every image below the folder, with empty
    captions. Images in other folders, or in none, are skipped and reported.

    Raises UserError when the folder does not exist or has no images.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"--input-folder {folder}: no such folder; give one with a folder of images for each class"
        )
    pairs = FolderPairs(folder, PackedStrings(), PackedStrings(), [])
    known, outside = set(classes), []
    for path in sorted(list_files(folder)[0]):
        parts = os.path.relpath(path, folder).split(os.sep)
        name = parts[0] if len(parts) > 1 else ""
        if known and name not in known:
            outside.append(path)
            continue
        pairs.images.append(path)
        pairs.captions.append(name if known else "")
    if outside:
        example = os.path.relpath(outside[0], folder)
        pairs.skipped.append(Skipped(len(outside), "images in folders that are not classes of this model", example))
    if not len(pairs.images):
        raise UserError(
            "--input-folder {}: no image in it{}; expected <class>/<image> ({})".format(
                folder,
                ": " + str(pairs.skipped[0]) if outside else "",
                " ".join("*" + suffix for suffix in IMAGE_SUFFIXES),
            )
        )
    return pairs


def imagenet_folders(folder: str) -> tuple[str, str]:
    """Return an ImageNet folder's train and val folders, "" for a missing val; without train: the folder itself, ""."""
    train, validation = os.path.join(folder, "train"), os.path.join(folder, "val")
    if not os.path.isdir(train):
        return folder, ""
    return train, validation if os.path.isdir(validation) else ""
