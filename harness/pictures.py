"""Pictures: their place in a text, and their pixels. Of tasks in text nothing here is used."""

import torch

from tasks import IMAGE


def place_pictures(model, text):
    """The text with as many tokens for each picture as the model reads of it."""
    if IMAGE not in text:
        return text
    vision = model.config.vision_config
    return text.replace(IMAGE, IMAGE * (vision.image_size // vision.patch_size) ** 2)


def pixel_values(images, device):
    """What a model takes of each row's pictures, (H, W, 3) uint8: (n, 3, H, W) in [-1, 1]; nothing of none."""
    pictures = [torch.from_numpy(image) for row in images for image in row]
    if not pictures:
        return {}
    pixels = torch.stack(pictures).to(device).permute(0, 3, 1, 2)
    return dict(pixel_values=pixels.float() / 127.5 - 1)
