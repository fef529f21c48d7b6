"""The card of a dataset of token ids, from the manifest of what was prepared."""

from typing import Any

from recipe.text import printable


def dataset_card(repo_id: str, manifest: dict[str, Any]) -> bytes:
    """README.md of the repository."""
    from huggingface_hub import DatasetCardData

    tokenizer, source, parts = manifest["tokenizer"], manifest["source"], ("training", "held_out")
    is_parquet = manifest["settings"]["format"] == "parquet"
    splits = {name: any(file.startswith(name[:3]) for file in manifest["files"]) for name in ("train", "validation")}
    paths = [
        {"split": split, "path": f"{start}-*.parquet"}
        for split, start in (("train", "train"), ("validation", "val"))
        if splits[split] and is_parquet
    ]
    metadata = DatasetCardData(
        tags=["token-ids", "pretraining"],
        task_categories=["text-generation"],
        configs=[{"config_name": "default", "data_files": paths}] if paths else None,
    )
    count = "\n".join(
        f"| {name} | {manifest[part]['documents']:,} | {manifest[part]['tokens']:,} |"
        for name, part in zip(("train", "validation"), parts, strict=True)
    )
    packed = " --data.rows_are packed" if manifest["rows_are"] == "packed" else ""
    of = (
        f"`{source['dataset']}`, split `{source['split']}`"
        if "dataset" in source
        else f"{len(source['files']):,} files"
    )
    shape = f"Column `input_ids`: a row is a document, without its end-of-text token, as {manifest['dtype']}."
    if packed:
        shape = f"Column `input_ids`: a row is a piece of a stream of tokens, as {manifest['dtype']}."
    how = f"""```bash
python -m recipe train --data.token_files 'hf://datasets/{repo_id}/*.parquet' --data.tokenizer {tokenizer["name"]}{packed} \\
  --batch.lanes {manifest["settings"]["batch.lanes"]}
```

With these lanes that reads the documents in the order in which the text itself would be read, and holds out `val-*`.
`--data.dataset {repo_id}` reads the split `train` alone, and holds out one document in `data.validation_one_in` of it, by a
hash of its tokens."""
    if not is_parquet:
        shape = f"Shards of llm.c: a header of 256 int32, then {manifest['dtype']}, an end-of-text token before each document."
        how = f"""```bash
hf download {repo_id} --repo-type dataset --local-dir tokens
python -m recipe train --data.token_files 'tokens/*.bin' --data.tokenizer {tokenizer["name"]}{packed}
```"""
    if manifest["settings"]["data.tokenizer"] is None and manifest["settings"]["model.init_from"] is None:
        download = f"hf download {repo_id} --repo-type dataset --include 'tokenizer/*' --local-dir ."
        how = f"The tokenizer was trained on the text; `{download}` brings it.\n\n{how}"
    return printable(f"""---
{metadata.to_yaml()}
---

# {repo_id}

Token ids of {of}, made by `recipe prepare` with the tokenizer `{tokenizer["name"]}` ({tokenizer["tokens"]:,} tokens,
end-of-text {tokenizer["end_of_text"]}, SHA-256 of the vocabulary `{tokenizer["vocabulary_sha256"][:16]}...`). {shape}

| split | documents | tokens |
|---|---|---|
{count}

`manifest.json` has the source, the settings, and the SHA-256 of each file.

{how}
""").encode()
