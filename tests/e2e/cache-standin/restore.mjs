import { execFileSync } from 'node:child_process';
import { appendFileSync, mkdirSync } from 'node:fs';
import { input, readable } from './store.mjs';

const [key, starts] = [input('key'), input('restore-keys').split('\n').map((line) => line.trim()).filter(Boolean)];
const caches = [...readable()];
const found = caches.find(([name]) => name === key)
  ?? starts.map((start) => caches.find(([name]) => name.startsWith(start))).find(Boolean);
if (found) {
  mkdirSync(input('path'), { recursive: true });
  execFileSync('tar', ['-xf', found[1], '-C', input('path')]);
}
console.log(found ? `restored ${found[0]}` : `no cache for ${key}`);
appendFileSync(process.env.GITHUB_OUTPUT, `cache-hit=${found?.[0] === key}\ncache-matched-key=${found?.[0] ?? ''}\n`);
