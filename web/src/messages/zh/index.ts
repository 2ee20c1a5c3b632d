import common from './common';
import control from './control';
import language from './language';
import steps from './steps';
import fine from './fine';
import relu from './relu';
import context from './context';
import reasoning from './reasoning';
import service from './service';
import errors from './errors';
import hero from './hero';
import summary from './summary';
import prompt from './prompt';
import flow from './flow';
import tokens from './tokens';
import attention from './attention';
import router from './router';
import experts from './experts';
import merge from './merge';
import next from './next';
import balance from './balance';
import dense from './dense';
import whatif from './whatif';
import thinking from './thinking';
import traffic from './traffic';
import training from './training';

export const zh = {
  common,
  control,
  language,
  steps,
  fine,
  relu,
  context,
  reasoning,
  service,
  errors,
  hero,
  summary,
  prompt,
  flow,
  tokens,
  attention,
  router,
  experts,
  merge,
  next,
  balance,
  dense,
  whatif,
  thinking,
  traffic,
  training,
};
