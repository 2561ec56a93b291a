#!/usr/bin/env python3
"""The same samples in the other layouts that preprocess_data.py reads: an array with offsets, parquet, jsonl, tars.

python examples/data/layouts.py CODES/samples.jsonl OUTPUT_DIR
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TARS = 2


def main(samples: Path, output: Path) -> None:
    """Write every layout of `samples` (rows with codes_path, code_offset and code_len) into `output`."""
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    arrays = {path: np.load(samples.parent / path) for path in {row["codes_path"] for row in rows}}
    codes = [arrays[row["codes_path"]][row["code_offset"] :][: row["code_len"]] for row in rows]
    rows = [{key: row[key] for key in row if key not in ("codes_path", "code_offset", "wav_path")} for row in rows]
    output.mkdir(parents=True, exist_ok=True)

    np.save(output / "array.codes.npy", np.concatenate(codes))
    np.save(output / "array.offsets.npy", np.cumsum([0, *map(len, codes)]))
    (output / "array.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    whole = [{**row, "codes": array.tolist()} for row, array in zip(rows, codes, strict=True)]
    pq.write_table(pa.Table.from_pylist(whole), output / "table.parquet")
    with gzip.open(output / "lines.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in whole)

    pairs = list(zip(rows, codes, strict=True))
    for part in range(TARS):
        with tarfile.open(output / f"shard-{part:03d}.tar", "w") as archive:
            for row, array in pairs[len(pairs) * part // TARS : len(pairs) * (part + 1) // TARS]:
                npy = io.BytesIO()
                np.save(npy, array)
                for ending, data in (("json", json.dumps(row).encode()), ("npy", npy.getvalue())):
                    member = tarfile.TarInfo(f"{row['sample_id']}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
