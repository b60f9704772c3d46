"""Batches of scenes for each training of the book's models: each purpose draws from its own block of seeds (`data.BLOCKS`)."""

from mmrecipes.data.splits import block
from mmrecipes.mini.batches import MANY, CaptionBatches, ChatBatches, NovelBatches, VisionBatches
from mmrecipes.train.loop import TrainConfig


def chat_batches(purpose: str, config: TrainConfig, tokenizer) -> ChatBatches:
    """Images and questions for a student, recovery, lora, connector, encoder-swap or qat. Raises UserError for other purposes."""
    return ChatBatches(block(f"{purpose}/chat"), config.steps, config.batch, tokenizer)


def novel_batches(config: TrainConfig, tokenizer, replay: bool = False) -> NovelBatches:
    """Images and questions for LoRA about colours and shapes that no model of the book has seen; half of it with `replay`."""
    return NovelBatches(block("lora/chat"), config.steps, config.batch, tokenizer, replay)


def image_batches(purpose: str, config: TrainConfig) -> VisionBatches:
    """Images for a student or encoder-swap; every other batch has much printed in it, since reading is learned last."""
    return VisionBatches(block(f"{purpose}/images"), config.steps, config.batch, printed=MANY, alternate=True)


def caption_batches(purpose: str, config: TrainConfig, tokenizer) -> CaptionBatches:
    """Images, captions and hard negatives for a student or recovery."""
    return CaptionBatches(block(f"{purpose}/captions"), config.steps, config.batch, tokenizer)
