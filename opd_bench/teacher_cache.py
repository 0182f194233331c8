"""A teacher's distributions kept on disk, for text that is trained on again: by another pass, another arm, or after a restart.

    teacher = CachedTeacher(ModelTeacher(model), top=32, path=folder / "scores.sqlite")

Of each distribution the ``top`` likeliest tokens are kept, and all others as one event, in half precision. Rollouts of a student are never
seen again, so they are reduced in the same way and not kept. Any number of processes may share a file.

Shapes: N response tokens, K tokens kept, E = K + 1 events.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opd_bench.errors import UserError
from opd_bench.scoring import Scores, Sparse, Teacher, chunks, likeliest
from opd_bench.sequences import Sequences

WAIT_S = 60  # for another process that writes


@dataclass(frozen=True)
class CachedTeacher:
    exact: Teacher  # whose distributions are dense
    top: int
    path: Path

    def __call__(self, sequences: Sequences) -> Scores:
        keys = [_key(sequences, row, self.top) for row in range(len(sequences))]
        known = {} if sequences.updates is not None else self._read(keys)
        missing = [row for row, key in enumerate(keys) if key not in known]
        if missing:
            fresh = self._score(sequences[missing])
            if sequences.updates is None:
                self._write({keys[row]: scores for row, scores in zip(missing, fresh, strict=True)})
            known |= {keys[row]: scores for row, scores in zip(missing, fresh, strict=True)}
        found = [known[key] for key in keys]
        return Sparse(torch.cat([scores.log_probs_NE for scores in found]), torch.cat([scores.top_NK for scores in found]))

    def _score(self, sequences: Sequences) -> list[Sparse]:
        """One for each row, rounded as if they had been read again."""
        exact, lengths = self.exact(sequences), (sequences.length_B - sequences.prompt_B).tolist()
        first_1V, _ = exact[:1]
        cuts = chunks(sequences.response_tokens, first_1V.shape[1], first_1V.device)
        pieces = [likeliest(exact[cut][0], self.top) for cut in cuts]
        log_probs_NE = torch.cat([piece.log_probs_NE.half().float().cpu() for piece in pieces])
        top_NK = torch.cat([piece.top_NK.cpu() for piece in pieces])
        return [Sparse(*part) for part in zip(log_probs_NE.split(lengths), top_NK.split(lengths), strict=True)]

    def _read(self, keys: list[bytes]) -> dict[bytes, Sparse]:
        with self._open() as file:
            rows = [file.execute("SELECT key, ids, log_probs FROM scores WHERE key = ?", (key,)).fetchone() for key in set(keys)]
        return {key: self._sparse(ids, log_probs) for key, ids, log_probs in filter(None, rows)}

    def _sparse(self, ids: bytes, log_probs: bytes) -> Sparse:
        log_probs_NE = np.frombuffer(log_probs, np.float16).reshape(-1, self.top + 1).astype(np.float32)
        return Sparse(torch.from_numpy(log_probs_NE), torch.from_numpy(np.frombuffer(ids, np.int32).reshape(-1, self.top).astype(np.int64)))

    def _write(self, scores: dict[bytes, Sparse]) -> None:
        rows = [(key, of.top_NK.numpy().astype(np.int32).tobytes(), of.log_probs_NE.half().numpy().tobytes()) for key, of in scores.items()]
        with self._open() as file:
            file.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT_S)) as file, file:
                file.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, ids BLOB, log_probs BLOB)")
                yield file
        except sqlite3.DatabaseError as error:
            raise UserError(f"cannot use {self.path}: {error}; free some space, or delete it and it will be made again") from None


def _key(sequences: Sequences, row: int, top: int) -> bytes:
    ids_T = sequences.ids_BT[row, : sequences.length_B[row]].numpy().astype(np.int64)
    return hashlib.sha256(f"{top} {int(sequences.prompt_B[row])}".encode() + ids_T.tobytes()).digest()
