import { readFileSync } from 'node:fs';

const file = process.env.INPUT_SARIF_FILE;
const rules = JSON.parse(readFileSync(file)).runs[0].results.map((result) => result.ruleId);
console.log(`sarif ${process.env.INPUT_CATEGORY}: ${rules.join(' ')}`);
