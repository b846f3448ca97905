"""The tokenizer that `prepare` trains as a tokenizer.json, which transformers reads with the same result.

A newline is a token of its own, and every line behind one begins like a word after a space (data/sentence_pieces.py):
sentencepiece's own reader in transformers does the latter for the first line only.
"""

from __future__ import annotations

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megatron_rlhf.data.sentence_pieces import END, NEWLINE, PAD, UNKNOWN

_SPACE = "\u2581"


def of_sentencepiece(model: bytes) -> str:
    """The text of the tokenizer.json of a sentencepiece model that `prepare` trained."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model)
    pieces = [str(processor.id_to_piece(id)) for id in range(processor.get_piece_size())]
    plain = {
        piece: id
        for id, piece in enumerate(pieces)
        if id not in (PAD, UNKNOWN, END, NEWLINE) and not processor.is_byte(id)
    }
    scores = {piece: processor.get_score(id) for piece, id in plain.items()}
    pairs = (
        (whole[:cut], whole[cut:])
        for whole in plain
        for cut in range(1, len(whole))
        if whole[:cut] in plain and whole[cut:] in plain
    )
    # the likeliest piece is put together first; the sort keeps the cuts of one piece together
    merges = sorted(pairs, key=lambda pair: -scores[pair[0] + pair[1]])
    spelled = any(processor.is_byte(id) for id in range(len(pieces)))
    bpe = models.BPE(
        vocab={piece: id for id, piece in enumerate(pieces)},
        merges=merges,
        unk_token=pieces[UNKNOWN],
        fuse_unk=True,
        byte_fallback=spelled,
    )
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    made.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(Regex(f"\n{_SPACE}"), "\n"),
            decoders.Replace(_SPACE, " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_tokens([AddedToken(pieces[NEWLINE], normalized=False)])
    made.add_special_tokens([AddedToken(pieces[id], normalized=False, special=True) for id in (PAD, UNKNOWN, END)])
    return str(made.to_str(pretty=True))
