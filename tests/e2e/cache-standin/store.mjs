// Caches in the directory $CACHE_STANDIN, one folder for each branch. Unlike GitHub's, they are not told apart by the
// path that they were saved from, because act has another temporary directory in each run.
import { mkdirSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';

export const input = (name) => (process.env[`INPUT_${name.toUpperCase()}`] ?? '').trim();
const folder = (ref) => join(process.env.CACHE_STANDIN, encodeURIComponent(ref));

/** The place of a new cache: that of the branch, or of the pull request, that the run is for. */
export function place(key) {
  mkdirSync(folder(process.env.GITHUB_REF), { recursive: true });
  return join(folder(process.env.GITHUB_REF), `${encodeURIComponent(key)}.tar`);
}

/** The caches that the run may read, those of its own branch first, the newest first. */
export function* readable() {
  for (const ref of new Set([process.env.GITHUB_REF, 'refs/heads/main'])) {
    let files = [];
    try {
      files = readdirSync(folder(ref)).map((name) => join(folder(ref), name));
    } catch {}
    files.sort((one, other) => statSync(other).mtimeMs - statSync(one).mtimeMs);
    for (const file of files) yield [decodeURIComponent(file.split('/').pop().replace(/\.tar$/, '')), file];
  }
}
