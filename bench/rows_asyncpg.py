"""asyncpg's ways to commit a batch of rows; see bench/drivers.py."""

from __future__ import annotations

import asyncio

import asyncpg  # type: ignore[import-untyped]

from bench.rows import COLUMNS, INSERT, TABLE, UNNEST, Rows, arguments, measure

_PLACES = [f"${number}" for number in range(1, len(COLUMNS) + 1)]


async def main() -> None:
    chosen = arguments()
    connection = await asyncpg.connect(chosen.url)
    await connection.execute(TABLE)
    unnest = await connection.prepare(UNNEST.format(*_PLACES))
    insert = INSERT.format(*_PLACES)

    async def send(rows: Rows) -> None:
        if chosen.form == "unnest":
            await unnest.fetch(*zip(*rows, strict=True))
        elif chosen.form == "executemany":
            await connection.executemany(insert, rows)
        else:
            await connection.copy_records_to_table("journal", records=rows, columns=COLUMNS)

    await measure(send, chosen)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
