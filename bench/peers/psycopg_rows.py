"""psycopg's ways to commit a batch of rows; see bench/drivers.py."""

from __future__ import annotations

import asyncio

import psycopg

from bench.rows import COLUMNS, COPY, INSERT, TABLE, TYPES, UNNEST, Rows, arguments, measure

_PLACES = ["%b"] * len(COLUMNS)


async def main() -> None:
    chosen = arguments()
    connection = await psycopg.AsyncConnection.connect(chosen.url, autocommit=True)
    await connection.execute(TABLE)
    unnest, insert = UNNEST.format(*_PLACES), INSERT.format(*_PLACES)

    async def send(rows: Rows) -> None:
        if chosen.form == "unnest":
            columns = [list(column) for column in zip(*rows, strict=True)]
            await connection.execute(unnest, columns, prepare=True)
            return
        async with connection.transaction(), connection.cursor() as cursor:
            if chosen.form == "executemany":
                await cursor.executemany(insert, rows)
            elif chosen.form == "copy":
                async with cursor.copy(f"{COPY} (FORMAT binary)") as copy:
                    copy.set_types(TYPES)
                    for row in rows:
                        await copy.write_row(row)
            else:
                async with connection.pipeline():
                    for row in rows:
                        await cursor.execute(insert, row, prepare=True)

    await measure(send, chosen)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main())
