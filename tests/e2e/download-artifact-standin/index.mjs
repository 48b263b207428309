// The artifact protocol (twirp: ListArtifacts, GetSignedArtifactURL, a GET), each artifact into a directory of its name, as
// actions/download-artifact does without merge-multiple. It unpacks what upload-artifact-standin has packed.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { inflateRawSync } from 'node:zlib';

const input = (name) => (process.env[`INPUT_${name.toUpperCase()}`] ?? '').trim();
const token = process.env.ACTIONS_RUNTIME_TOKEN;
const scopes = JSON.parse(Buffer.from(token.split('.')[1], 'base64url')).scp.split(' ');
const [, run, job] = scopes.find((scope) => scope.startsWith('Actions.Results:')).split(':');
const ids = { workflow_run_backend_id: run, workflow_job_run_backend_id: job };

async function call(method, fields) {
  const service = 'twirp/github.actions.results.api.v1.ArtifactService';
  const response = await fetch(`${process.env.ACTIONS_RESULTS_URL.replace(/\/$/, '')}/${service}/${method}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: `Bearer ${token}` },
    body: JSON.stringify({ ...ids, ...fields }),
  });
  if (!response.ok) throw new Error(`${method}: HTTP ${response.status}`);
  return response.json();
}

/** The files of a zip archive (PKWARE APPNOTE 4.3), by its central directory. */
function* unzipped(archive) {
  const end = archive.lastIndexOf(Buffer.from('PK\x05\x06', 'latin1'));
  let at = archive.readUInt32LE(end + 16);
  for (let left = archive.readUInt16LE(end + 10); left > 0; left -= 1) {
    const [method, packed, named] = [archive.readUInt16LE(at + 10), archive.readUInt32LE(at + 20), archive.readUInt16LE(at + 28)];
    const local = archive.readUInt32LE(at + 42);
    const name = archive.toString('utf8', at + 46, at + 46 + named);
    const begins = local + 30 + archive.readUInt16LE(local + 26) + archive.readUInt16LE(local + 28);
    const data = archive.subarray(begins, begins + packed);
    yield [name, method === 8 ? inflateRawSync(data) : data];
    at += 46 + named + archive.readUInt16LE(at + 30) + archive.readUInt16LE(at + 32);
  }
}

const pattern = new RegExp(`^${input('pattern').split('*').map((part) => part.replace(/[^\w-]/g, '\\$&')).join('.*')}$`);
const listed = (await call('ListArtifacts', {})).artifacts ?? [];
for (const { name } of listed.filter((artifact) => pattern.test(artifact.name))) {
  const signed = await call('GetSignedArtifactURL', { name });
  const answer = await fetch(signed.signedUrl ?? signed.signed_url);
  if (!answer.ok) throw new Error(`GET: HTTP ${answer.status}`);
  const directory = join(input('path'), name);
  mkdirSync(directory, { recursive: true });
  for (const [file, data] of unzipped(Buffer.from(await answer.arrayBuffer()))) writeFileSync(join(directory, file), data);
  console.log(`downloaded ${name}`);
}
