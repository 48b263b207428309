// The artifact protocol (twirp: CreateArtifact, two PUTs to the signed URL, FinalizeArtifact), so that a workflow that
// uploads can run where neither GitHub nor actions/upload-artifact can be reached. Unlike act's server, and like
// GitHub's, it refuses a name that was used before in the same run. Needs Node.js >= 20.15 (zlib.crc32).
import { appendFileSync, existsSync, readFileSync, statSync } from 'node:fs';
import { createHash } from 'node:crypto';
import { dirname, relative, resolve } from 'node:path';
import { crc32, deflateRawSync } from 'node:zlib';

const input = (name) => (process.env[`INPUT_${name.toUpperCase()}`] ?? '').trim();

function fail(message) {
  console.log(`::error::${message}`);
  process.exit(1);
}

/** The files that lines of patterns name. Like @actions/glob, it takes a backslash as an escape; it knows no wildcard. */
function filesNamed(patterns) {
  const lines = patterns.split('\n').map((line) => line.trim()).filter(Boolean);
  const wild = lines.find((line) => /[*?[]/.test(line.replace(/\\./g, '')));
  if (wild) fail(`${wild} holds a wildcard`);
  return lines.map((line) => line.replace(/\\(.)/g, '$1')).filter((path) => existsSync(path) && statSync(path).isFile()).sort();
}

/** A zip archive (PKWARE APPNOTE 4.3): local headers with data, central directory, end record. */
function zipped(root, paths) {
  const locals = [];
  const centrals = [];
  let offset = 0;
  for (const path of paths) {
    const data = readFileSync(path);
    const packed = deflateRawSync(data);
    const name = Buffer.from(relative(root, path));
    const common = Buffer.alloc(26); // the fields that both headers share, from "version needed" on
    common.writeUInt16LE(20, 0);
    common.writeUInt16LE(0x0800, 2); // names are UTF-8
    common.writeUInt16LE(8, 4); // deflate
    common.writeUInt16LE(0x21, 8); // 1980-01-01
    common.writeUInt32LE(crc32(data), 10);
    common.writeUInt32LE(packed.length, 14);
    common.writeUInt32LE(data.length, 18);
    common.writeUInt16LE(name.length, 22);
    const tail = Buffer.alloc(14); // no comment, disk 0, no attributes
    const at = Buffer.alloc(4);
    at.writeUInt32LE(offset);
    const local = Buffer.concat([Buffer.from('PK\x03\x04', 'latin1'), common, name, packed]);
    centrals.push(Buffer.concat([Buffer.from('PK\x01\x02\x14\x00', 'latin1'), common, tail.subarray(0, 10), at, name]));
    locals.push(local);
    offset += local.length;
  }
  const directory = Buffer.concat(centrals);
  const end = Buffer.alloc(22);
  end.write('PK\x05\x06', 0, 'latin1');
  end.writeUInt16LE(paths.length, 8);
  end.writeUInt16LE(paths.length, 10);
  end.writeUInt32LE(directory.length, 12);
  end.writeUInt32LE(offset, 16);
  return Buffer.concat([...locals, directory, end]);
}

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
  if (!response.ok) fail(`${method}: HTTP ${response.status}`);
  return response.json();
}

async function put(url, body) {
  const response = await fetch(url, { method: 'PUT', body });
  if (!response.ok) fail(`PUT: HTTP ${response.status}`);
}

const name = input('name');
const paths = filesNamed(input('path'));
const root = paths.length ? dirname(resolve(paths[0])) : '';
if (paths.length === 0) {
  if (input('if-no-files-found') === 'error') fail(`no files in ${input('path')}`);
  console.log(`::warning::no files in ${input('path')}`);
  process.exit(0);
}
// act's server drops the connection where the run has no artifact yet.
const known = await call('ListArtifacts', {}).then((listed) => listed.artifacts ?? [], () => []);
if (known.some((artifact) => artifact.name === name)) fail(`409: an artifact named ${name} exists in this run`);

const archive = zipped(root, paths);
const digest = createHash('sha256').update(archive).digest('hex');
const created = await call('CreateArtifact', { name, version: 4 });
const url = created.signedUploadUrl ?? created.signed_upload_url;
await put(`${url}&comp=block&blockid=MDAwMA==`, archive);
await put(`${url}&comp=blocklist`, '<?xml version="1.0"?><BlockList><Latest>MDAwMA==</Latest></BlockList>');
const done = await call('FinalizeArtifact', { name, size: String(archive.length), hash: `sha256:${digest}` });
const id = done.artifactId ?? done.artifact_id;
const { GITHUB_SERVER_URL: server, GITHUB_REPOSITORY: repository, GITHUB_RUN_ID: runId } = process.env;
appendFileSync(
  process.env.GITHUB_OUTPUT,
  `artifact-id=${id}\nartifact-digest=${digest}\nartifact-url=${server}/${repository}/actions/runs/${runId}/artifacts/${id}\n`,
);
console.log(`uploaded ${name}: ${paths.length} files, ${archive.length} bytes, retention ${input('retention-days')}`);
