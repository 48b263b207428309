import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { input, place } from './store.mjs';

const file = place(input('key'));
if (existsSync(file)) {
  console.log(`::warning::a cache with the key ${input('key')} exists`);
} else {
  execFileSync('tar', ['-cf', file, '-C', input('path'), '.']);
  console.log(`saved ${input('key')}`);
}
