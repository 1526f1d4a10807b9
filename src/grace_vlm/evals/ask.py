"""One question about one picture."""

from __future__ import annotations

from pathlib import Path

from grace_vlm.data.collate import collate
from grace_vlm.data.encode import Encoder
from grace_vlm.data.pictures import PictureStore, patchify_of
from grace_vlm.data.rows import IMAGE_MARKER, Row, Turn
from grace_vlm.errors import RequestError
from grace_vlm.evals.generate import greedy
from grace_vlm.media.image import ImageFault, load_image
from grace_vlm.models.load import LoadedModel
from grace_vlm.models.vision import VisionFeatures


def ask(loaded: LoadedModel, question: str, image: Path | None, max_new_tokens: int) -> str:
    """The model's greedy answer; ``RequestError`` for an empty question or a picture that cannot be used."""
    if not question.strip():
        raise RequestError("the question is empty; pass --question TEXT")
    name = image.name if image is not None else None
    text = question.replace(IMAGE_MARKER, " ").strip()
    turns = (Turn("user", f"{IMAGE_MARKER}\n{text}" if image is not None else text), Turn("assistant", ""))
    row = Row(index=0, id="chat", images=(name,) if name is not None else (), turns=turns, meta={})
    config = loaded.model.config
    store = PictureStore(patchify_of(loaded.adapter, config, loaded.processor))
    try:
        pictures = [store.add(image.name, load_image(image))] if image is not None else []
    except ImageFault as fault:
        raise RequestError(f"{image}: {fault.reason}") from None
    encoder = Encoder(loaded.processor, loaded.adapter, config)
    sample = encoder.prompt(row, [picture.grid for picture in pictures])
    lengths = [loaded.adapter.num_visual_tokens(config, picture.grid) for picture in pictures]
    batch = collate([sample], pictures, lengths, loaded.processor.tokenizer.pad_token_id, "left")
    tokens, _ = greedy(loaded, VisionFeatures(loaded.adapter, loaded.model), batch, max_new_tokens)
    answer: str = loaded.processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
    return answer
